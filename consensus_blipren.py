"""What known captions say about a new one: predicted CIDEr of candidates, joined captions, and guided generation.

Captions are lists of token ids of the language model, without its end token.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import torch
from transformers import LogitsProcessor

NGRAMS, SIGMA = 4, 6.0  # as coco-caption's CIDEr-D
CONTEXT = 3  # tokens that the guiding n-gram model looks back
SHARED = 2  # tokens at which two captions are joined
AGREED = 0.2  # a word on whose presence people agree less is never doubted
BACKOFF = 0.5  # weight of the shorter context, in captions
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that products of it are all different


def hash_captions(captions: list[list[int]]) -> np.ndarray:
    """Return a 64-bit hash of each whole caption's tokens, `(captions,)`."""
    padded = _pad(captions)
    hashes = np.array([len(caption) for caption in captions], dtype=np.uint64)
    for column in padded.T:
        hashes = np.where(column > 0, _mix(hashes, column), hashes)
    return hashes


def letters_of_tokens(texts: list[str]) -> torch.Tensor:
    """Return what each token adds to the hash of a caption's letters, `(tokens, 2)` in int64.

    Letters and digits count, in lower case; spaces and punctuation do not. A token that is a part of a character counts
    as itself.

    Args:
        texts: each token of the vocabulary alone, decoded.
    """
    values = []
    for token, text in enumerate(texts):
        characters = [ord(c) for c in text.lower() if c.isalnum()]
        if "\ufffd" in text:
            characters = [0x110000 + token]  # beyond the last character
        value, factor = 0, 1
        for character in characters:
            value, factor = (value * _FACTOR + character) % 2**64, factor * _FACTOR % 2**64
        values.append([value, factor])
    return torch.from_numpy(np.array(values, dtype=np.uint64).view(np.int64))


def hash_letters(captions: list[list[int]], letters: torch.Tensor) -> np.ndarray:
    """Return a 64-bit hash of each caption's letters and digits, `(captions,)`.

    Args:
        letters: `(tokens, 2)`, of `letters_of_tokens`.
    """
    values, factors = np.concatenate([[[0, 1]], letters.numpy()]).view(np.uint64).T  # of padding first
    hashes = np.zeros(len(captions), dtype=np.uint64)
    for column in _pad(captions).T:
        hashes = hashes * factors[column] + values[column]
    return hashes


def _pad(captions: list[list[int]]) -> np.ndarray:
    """Return `(captions, longest)` token ids plus one, 0 behind the end of a caption."""
    padded = np.zeros((len(captions), max([NGRAMS, *map(len, captions)])), dtype=np.uint64)
    for row, caption in enumerate(captions):
        padded[row, : len(caption)] = np.array(caption, dtype=np.uint64) + np.uint64(1)
    return padded


def _mix(hashes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    hashes = hashes * np.uint64(_FACTOR) + tokens
    return hashes ^ (hashes >> np.uint64(29))


def _hash_ngrams(captions: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return row, order (0 to 3) and hash of every n-gram of the captions."""
    padded = _pad(captions)
    width = padded.shape[1]
    rows, orders, hashes = [], [], []
    value = np.zeros_like(padded)
    for n in range(NGRAMS):
        value = _mix(value[:, : width - n], padded[:, n:])
        row, column = np.nonzero(padded[:, n:])
        rows.append(row)
        orders.append(np.full(len(row), n))
        hashes.append(value[row, column] * np.uint64(NGRAMS) + np.uint64(n))
    return np.concatenate(rows), np.concatenate(orders), np.concatenate(hashes)


class WeighedCaptions:
    """Captions as sparse tf-idf vectors of length one for each order of n-grams.

    Attributes:
        rows, hashes, values: caption, n-gram and weight of each entry. lengths: `(captions,)` in tokens.
    """

    def __init__(self, captions: list[list[int]], frequencies: "DocumentFrequencies"):
        rows, orders, hashes = _hash_ngrams(captions)
        order = np.lexsort((hashes, rows))
        rows, orders, hashes = rows[order], orders[order], hashes[order]
        first = np.flatnonzero(np.r_[True, (rows[1:] != rows[:-1]) | (hashes[1:] != hashes[:-1])][: len(rows)])
        times = np.diff(np.r_[first, len(rows)])
        self.rows, self.hashes = rows[first], hashes[first]
        values = times * frequencies.weights(self.hashes)
        group = self.rows * NGRAMS + orders[first]
        norms = np.sqrt(np.bincount(group, values**2, len(captions) * NGRAMS))
        norms[norms == 0] = 1.0
        self.values = values / norms[group]
        self.lengths = np.array([len(caption) for caption in captions])


class DocumentFrequencies:
    """In how many images' captions each n-gram is (Vedantam et al. 2015, arXiv 1411.5726).

    Args:
        hashes: of n-grams, sorted. counts: in how many images' captions each is; one that is not here is in one.
        images: how many images were counted.
        agreement: of each token, the share of the other captions of an image that have it where one has it.
    """

    def __init__(self, hashes: np.ndarray, counts: np.ndarray, images: int, agreement: dict[int, float] | None = None):
        self.hashes, self.counts, self.log_images = hashes, counts, math.log(max(2, images))
        self.agreement = agreement or {}

    @classmethod
    def count(cls, captions: list[list[list[int]]]) -> "DocumentFrequencies":
        """Count the n-grams in the captions of each image."""
        image_of = np.array([image for image, own in enumerate(captions) for _ in own], dtype=np.int64)
        rows, _, hashes = _hash_ngrams([caption for own in captions for caption in own])
        _, first = np.unique(_mix(hashes, image_of[rows].astype(np.uint64)), return_index=True)  # once an image
        shares: dict[int, list[float]] = defaultdict(list)
        for own in captions:
            if len(own) > 1:
                for token, count in Counter(token for caption in own for token in set(caption)).items():
                    shares[token].append((count - 1) / (len(own) - 1))
        agreement = {token: sum(found) / len(found) for token, found in shares.items()}
        return cls(*np.unique(hashes[first], return_counts=True), len(captions), agreement)

    def weights(self, hashes: np.ndarray) -> np.ndarray:
        """Return the inverse document frequency of n-grams."""
        place = np.searchsorted(self.hashes, hashes).clip(max=max(0, len(self.hashes) - 1))
        known = self.hashes[place] == hashes
        return self.log_images - np.log(np.where(known, self.counts[place], 1))


class ReferenceTable:
    """The captions of neighbours, made ready to compare candidates with.

    Args:
        captions: of each neighbour.
        frequencies: of n-grams in the whole memory.
    """

    def __init__(self, captions: list[list[list[int]]], frequencies: DocumentFrequencies):
        self.frequencies = frequencies
        counts = np.array([max(1, len(own)) for own in captions])
        self.image_of = np.array([image for image, own in enumerate(captions) for _ in own], dtype=np.int64)
        self.share = 1.0 / counts[self.image_of]
        weighed = WeighedCaptions([caption for own in captions for caption in own], frequencies)
        self.ngrams, column = np.unique(weighed.hashes, return_inverse=True)
        self.lengths, length_of = np.unique(weighed.lengths, return_inverse=True)
        self.rows, self.values = weighed.rows, weighed.values
        self.cell = length_of[self.rows] * len(self.ngrams) + column
        mentioned = [(i, t) for i, own in enumerate(captions) for t in {t for caption in own for t in caption}]
        self.mentioned = np.array(mentioned, dtype=np.int64).reshape(-1, 2)  # image and token

    def predicted_cider(self, candidates: list[list[int]], image_weights: np.ndarray) -> np.ndarray:
        """Return the CIDEr that each candidate would have against the weighted mean of the neighbours' captions.

        It is CIDEr-D without the clipping of repeated n-grams, which captions hardly have.

        Args:
            image_weights: `(neighbours,)`, of regression: they may be negative.

        Returns:
            `(candidates,)`, between 0 and 10 where the weights are positive and add up to 1.
        """
        weights = (image_weights[self.image_of] * self.share)[self.rows] * self.values
        shape = (len(self.lengths), len(self.ngrams))
        table = np.bincount(self.cell, weights, shape[0] * shape[1]).reshape(shape)
        own = WeighedCaptions(candidates, self.frequencies)
        place = np.searchsorted(self.ngrams, own.hashes).clip(max=shape[1] - 1)
        known = self.ngrams[place] == own.hashes
        penalty = np.exp(-((own.lengths[:, None] - self.lengths[None]) ** 2) / (2 * SIGMA**2))  # [candidates, lengths]
        rows, place, values = own.rows[known], place[known], own.values[known]
        alike = np.einsum("il,li->i", penalty[rows], table[:, place])
        return np.bincount(rows, values * alike, len(candidates)) * 10 / NGRAMS

    def doubts(self, image_weights: np.ndarray) -> dict[int, float]:
        """Return how much speaks against each token: its agreement above `AGREED`, times the predicted chance of its absence.

        Of what is there, people agree on objects rather than on colours and actions. Where they would agree on a word and
        similar images do not have it, it is likely invented.
        """
        images, tokens = self.mentioned.T
        there = np.bincount(tokens, image_weights[images]).clip(0, 1)
        return {
            token: (agreement - AGREED) * (1 - (there[token] if token < len(there) else 0.0))
            for token, agreement in self.frequencies.agreement.items()
            if agreement > AGREED
        }


def search_joined(
    candidates: list[tuple[int, ...]],
    score: Callable[[list[tuple[int, ...]]], np.ndarray],
    joins: int,
    joined: int,
    length: int,
) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Return the candidates and captions that are joined from the best of them, and their scores.

    Args:
        candidates: different ones. score: returns the score of each caption, `(captions,)`.
        joins: how often the best are joined with each other. joined: how many of them.
        length: most tokens of a joined caption.
    """
    candidates, scores = list(candidates), score(candidates)
    for _ in range(joins):
        best, considered = np.argsort(-scores, kind="stable")[:joined], set(candidates)
        more = [c for c in join_captions([candidates[i] for i in best], length) if c not in considered]
        if not more:
            break
        candidates += more
        scores = np.concatenate([scores, score(more)])
    return candidates, scores


def sum_doubts(captions: list[tuple[int, ...]], doubts: dict[int, float]) -> np.ndarray:
    """Return the sum of the doubts about each caption's different tokens, `(captions,)`."""
    return np.array([sum(doubts.get(token, 0.0) for token in set(caption)) for caption in captions])


def join_captions(captions: list[tuple[int, ...]], length: int) -> list[tuple[int, ...]]:
    """Return new captions that begin as one of these and, behind `SHARED` tokens that both have, end as another.

    Args:
        length: most tokens of a joined caption.
    """
    heads: dict[tuple, dict[tuple, None]] = defaultdict(dict)  # sets in order
    tails: dict[tuple, dict[tuple, None]] = defaultdict(dict)
    for caption in captions:
        for place in range(SHARED, len(caption) + 1):
            shared = caption[place - SHARED : place]
            heads[shared][caption[:place]] = None
            tails[shared][caption[place:]] = None
    joined = {
        head + tail: None
        for shared, found in heads.items()
        for head in found
        for tail in tails[shared]
        if len(head) + len(tail) <= length
    }
    known = set(captions)
    return [caption for caption in joined if caption not in known]


class NgramModel:
    """Probabilities of the next token in weighted captions, after at most `CONTEXT` tokens.

    Args:
        captions: each with its end token. weights: of each, not negative.
    """

    def __init__(self, captions: list[list[int]], weights: list[float]):
        counts: dict[tuple, Counter] = defaultdict(Counter)
        for caption, weight in zip(captions, weights, strict=True):
            padded = (-1,) * CONTEXT + tuple(caption)  # -1: before the first token
            for place in range(CONTEXT, len(padded)):
                for length in range(CONTEXT + 1):
                    counts[padded[place - length : place]][padded[place]] += weight
        self._counts, self._found = dict(counts), {}

    def next_tokens(self, tokens: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ids of possible next tokens, and the logarithms of their probabilities."""
        context = ((-1,) * CONTEXT + tokens)[-CONTEXT:]
        if context not in self._found:
            probabilities: dict[int, float] = {}
            for length in range(CONTEXT + 1):
                counts = self._counts.get(context[CONTEXT - length :], {})
                total = sum(counts.values())
                if total <= 0:
                    break
                kept = BACKOFF / (total + BACKOFF) if length else 0.0
                probabilities = {token: p * kept for token, p in probabilities.items()}
                for token, weight in counts.items():
                    probabilities[token] = probabilities.get(token, 0.0) + weight / total * (1 - kept)
            ids, values = list(probabilities), [max(p, 1e-12) for p in probabilities.values()]
            self._found[context] = torch.tensor(ids, dtype=torch.long), torch.tensor(values).log()
        return self._found[context]


class NgramGuidance(LogitsProcessor):
    """Mixes the language model's next token with that of the neighbours' captions (kNN-LM, arXiv 1911.00172).

    Args:
        models: of each image, `None` for a row that is not guided.
        weight: of the n-gram model, from 0 to below 1.
        prompt_length: tokens in front of the answers.
        rows_per_image: beams, or samples, of each image.
    """

    def __init__(self, models: list[NgramModel | None], weight: float, prompt_length: int, rows_per_image: int):
        self.models, self.weight = models, weight
        self.prompt_length, self.rows_per_image = prompt_length, rows_per_image

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        mixed = scores.float().log_softmax(dim=-1)
        for row, tokens in enumerate(input_ids[:, self.prompt_length :].tolist()):
            model = self.models[row // self.rows_per_image]
            if model is not None:
                ids, logs = (part.to(mixed.device) for part in model.next_tokens(tuple(tokens)))
                own = mixed[row] + math.log(1 - self.weight)
                own[ids] = torch.logaddexp(own[ids], logs + math.log(self.weight))
                mixed[row] = own
        return mixed.to(scores.dtype)


__all__ = [
    "DocumentFrequencies",
    "NgramGuidance",
    "NgramModel",
    "ReferenceTable",
    "WeighedCaptions",
    "hash_captions",
    "hash_letters",
    "join_captions",
    "letters_of_tokens",
    "search_joined",
    "sum_doubts",
]
