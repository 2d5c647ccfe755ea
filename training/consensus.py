"""Consensus captions: for each training image, the captions of other images that its features say will fit it best.

A small data set's captions hold far more than features can tell: what five people wrote of one photo is learned by heart,
and what is said of a new photo is no better for it. So the images teach each other. How well every caption of the set
fits every image is known (CIDEr against the image's own captions); kernel ridge regression on the mean patch feature
foretells it for an image that was left out; the captions foretold best for an image are what the bridge learns to say of
it. Nearest-neighbour captions (Devlin et al. 2015, arXiv 1505.04467) as the teacher of a distillation: what is kept of
the teacher is the bridge alone.
"""

import math
from collections import Counter, defaultdict

import torch

from blipren.training.data.tokens import build_table
from blipren.training.errors import UserError
from blipren.training.evaluation.tokenizer import tokenize
from blipren.training.self_critical import NGRAMS, SIGMA

MOST_IMAGES = 10_000  # captions x images and images x images are held in memory
RIDGE = 0.3  # .1 to 1 are alike on flickr8k-mini
BLOCK = 1000  # captions that are compared with all at a time


def caption_scores(references: list[list[str]]) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Captions of all images, [captions] the image of each, and [captions, images] CIDEr of each against each image.

    As `CiderReward`, but for all pairs at once, as products of sparse matrices; without CIDEr-D's clipping of repeated
    n-grams, which such a product cannot do and captions that people wrote hardly need.
    """
    captions = [text for texts in references for text in texts]
    image_of = torch.tensor([image for image, texts in enumerate(references) for _ in texts])
    words = [text.split() for text in tokenize(captions, "python")]
    bigrams = torch.tensor([max(len(w) - 1, 0) for w in words], dtype=torch.float32)
    images = len(references)
    scores = torch.zeros(len(captions), images)
    for n in range(1, NGRAMS + 1):
        counts = [Counter(tuple(w[i : i + n]) for i in range(len(w) - n + 1)) for w in words]
        seen_in: dict[tuple, set[int]] = defaultdict(set)
        for image, count in zip(image_of.tolist(), counts, strict=True):
            for ngram in count:
                seen_in[ngram].add(image)
        column = {ngram: i for i, ngram in enumerate(seen_in)}
        rarity = {ngram: math.log(images / len(where)) for ngram, where in seen_in.items()}
        places = [(caption, column[ngram]) for caption, count in enumerate(counts) for ngram in count]
        weights = torch.tensor([times * rarity[ngram] for count in counts for ngram, times in count.items()])
        row = torch.tensor([caption for caption, _ in places], dtype=torch.long)
        norm = torch.zeros(len(captions)).index_add_(0, row, weights**2).sqrt().clamp_min(1e-9)
        vectors = torch.sparse_coo_tensor(
            torch.tensor(places).reshape(-1, 2).T,
            weights / norm[row],
            (len(captions), len(column)),
            check_invariants=False,
        ).coalesce()
        for begin in range(0, len(captions), BLOCK):
            block = torch.arange(begin, min(begin + BLOCK, len(captions)))
            alike = torch.sparse.mm(vectors, vectors.index_select(0, block).to_dense().T)  # [captions, block]
            alike *= torch.exp(-((bigrams[:, None] - bigrams[None, block]) ** 2) / (2 * SIGMA**2))
            scores[block] += torch.zeros(images, len(block)).index_add_(0, image_of, alike).T
    return captions, image_of, scores * 10 / NGRAMS / torch.bincount(image_of, minlength=images)


def foretold(scores: torch.Tensor, image_of: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """[captions, images]: the score that the other images foretell for each image from its [images, width] features;
    -1 for its own captions.

    Kernel ridge regression with a Gaussian kernel as wide as the median distance, leave-one-out in closed form.
    """
    images = len(features)
    own = image_of[:, None] == torch.arange(images)
    # a caption is never wrong of its own image, which says nothing of others: there it counts as the average of others
    mean = (scores.masked_fill(own, 0).sum(dim=1) / max(images - 1, 1))[:, None]
    above = torch.where(own, 0.0, scores - mean)
    standard = ((features - features.mean(dim=0)) / features.std(dim=0).clamp_min(1e-6)).double()
    squares = torch.cdist(standard, standard) ** 2
    kernel = torch.exp(-squares / squares.median().clamp_min(1e-12))
    inverse = torch.linalg.inv(kernel + RIDGE * torch.eye(images, dtype=torch.double)).float()
    return (above - above @ inverse / inverse.diagonal() + mean).masked_fill(own, -1.0)


def consensus_captions(source, count: int) -> dict[int, list[str]]:
    """`count` different captions of other images for each image of a `CacheSource` that has captions, best first.

    Raises `UserError` where the images are too many to compare all with all, or too few.
    """
    references = source.references()
    if not 2 <= len(references) <= MOST_IMAGES:
        raise UserError(
            f"consensus_captions compares all images of a cache with each other, 2 to {MOST_IMAGES:,}; "
            f"{source.cache.folder} has {len(references):,} with captions: leave the setting out"
        )
    images, means = list(references), []
    for begin in range(0, len(images), BLOCK):
        inputs = source.inputs(images[begin : begin + BLOCK], None)
        features = inputs["patch_features"].float()
        mask = inputs.get("patch_attention_mask", torch.ones(features.shape[:2]))[..., None]
        means.append((features * mask).sum(dim=1) / mask.sum(dim=1))
    captions, image_of, scores = caption_scores([references[image] for image in images])
    order = foretold(scores, image_of, torch.cat(means)).argsort(dim=0, descending=True, stable=True)
    chosen = {}
    for place, image in enumerate(images):
        different = dict.fromkeys(captions[i] for i in order[:, place].tolist())
        chosen[image] = list(different)[:count]
    return chosen


def teach_each_other(source, count: int, processor) -> str:
    """Puts consensus captions in the place of the captions of a source's images; its questions keep their answers.
    Returns a line for the log."""
    chosen, rows = consensus_captions(source, count), source.cache.split(source.split)
    prompts, answers = [], []
    for image, (own_prompts, own_answers) in enumerate(zip(rows["prompts"], rows["answers"], strict=True)):
        asked = [(p, a) for p, a in zip(own_prompts, own_answers, strict=True) if p is not None]
        pairs = [(None, text) for text in chosen.get(image, [])] + asked
        prompts.append([prompt for prompt, _ in pairs])
        answers.append([answer for _, answer in pairs])
    source.texts = build_table(prompts, answers, processor)
    different = len({text for texts in chosen.values() for text in texts})
    return (
        f"consensus: {len(chosen):,} images learn {count} captions of other images each, {different:,} different ones"
    )
