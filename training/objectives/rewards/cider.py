"""CIDEr-D of captions as a reward."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from blipren.training.evaluation.metrics.tokenizer import tokenize

NGRAMS, SIGMA = 4, 6.0  # as coco-caption's CIDEr-D


class CiderReward:
    """CIDEr-D of one caption against its photo's references, document frequencies from all photos.

    pycocoevalcap's scorer gives the same numbers, but weights every reference again at each call. Here that is done once,
    since a run needs hundreds of thousands of rewards.

    Args:
        references: captions of each photo.
        others: captions of photos that do not count in the document frequencies, such as those of validation.
    """

    def __init__(self, references: dict[str, list[str]], others: dict[str, list[str]] | None = None):
        every = references | (others or {})
        flat = tokenize([text for texts in every.values() for text in texts], "python")
        counted, position = {}, 0
        for image, texts in every.items():
            counted[image] = [self._count(text) for text in flat[position : position + len(texts)]]
            position += len(texts)
        self.frequency: Counter = Counter()
        for counts in (counted[image] for image in references):
            self.frequency.update({ngram for count in counts for ngram in count})
        self.log_images = math.log(len(references))
        self.references = {image: [self._weigh(c) for c in counts] for image, counts in counted.items()}

    @staticmethod
    def _count(text: str) -> Counter:
        words = text.split()
        return Counter(tuple(words[i : i + n]) for n in range(1, NGRAMS + 1) for i in range(len(words) - n + 1))

    def _weigh(self, count: Counter) -> tuple[list[dict], list[float], int]:
        """Return tf-idf vectors and their norms by n-gram order, and the number of bigrams, which CIDEr-D takes as length."""
        vectors: list[dict] = [defaultdict(float) for _ in range(NGRAMS)]
        for ngram, times in count.items():
            vectors[len(ngram) - 1][ngram] = times * (self.log_images - math.log(max(1, self.frequency[ngram])))
        norms = [math.sqrt(sum(v * v for v in vector.values())) for vector in vectors]
        return vectors, norms, sum(times for ngram, times in count.items() if len(ngram) == 2)

    def __call__(self, images: list[str], captions: list[str]) -> list[float]:
        """Return the reward of each caption for its image, between 0 and 10."""
        rewards = []
        for image, text in zip(images, tokenize(captions, "python"), strict=True):
            vectors, norms, length = self._weigh(self._count(text))
            total = 0.0
            for theirs, their_norms, their_length in self.references[image]:
                penalty = math.exp(-((length - their_length) ** 2) / (2 * SIGMA**2))
                for mine, other, norm, their_norm in zip(vectors, theirs, norms, their_norms):
                    shared = sum(min(v, other[g]) * other[g] for g, v in mine.items() if g in other)
                    if norm and their_norm:
                        total += penalty * shared / (norm * their_norm)
            rewards.append(10 * total / NGRAMS / len(self.references[image]))
        return rewards

    def reward(
        self, completions: Sequence[str], image_ids: Sequence[str], prompts: Sequence[str | None], **columns
    ) -> list[float | None]:
        """Return CIDEr-D of captions, between 0 and 10. It does not apply to answers to questions."""
        captions = [i for i, prompt in enumerate(prompts) if prompt is None]
        scores = self([image_ids[i] for i in captions], [completions[i] for i in captions])
        found: list[float | None] = [None] * len(completions)
        for i, score in zip(captions, scores):
            found[i] = score
        return found
