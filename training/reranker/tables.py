"""The directions in which the captions of images differ most, as tf-idf vectors of n-grams."""

from __future__ import annotations

import math

import numpy as np
import torch

from blipren.consensus_blipren import SIGMA, DocumentFrequencies, WeighedCaptions
from blipren.training.errors import UserError

MOST_NGRAMS = 30_000  # the most frequent ones; each costs a row of the directions
MOST_IMAGES = 5_000  # from which the directions are computed; a matrix of images x n-grams is decomposed
LONGEST = 64  # tokens of a caption from which on its factor no longer changes


def build_tables(captions: list[list[list[int]]], width: int) -> dict[str, torch.Tensor]:
    """Return the tables of a reranker, see `BliprenReranker`.

    N-grams in the captions of one image alone say nothing about others and are left out. The directions are the first
    right singular vectors of the images' mean tf-idf vectors, less their mean.

    Args:
        captions: token ids of the captions of each image.
        width: directions.

    Raises:
        UserError: captions of different images have nothing in common.
    """
    frequencies = DocumentFrequencies.count(captions)
    common = np.flatnonzero(frequencies.counts > 1)
    common = np.sort(common[np.argsort(-frequencies.counts[common], kind="stable")[:MOST_NGRAMS]])
    if not len(common):
        raise UserError("no word or n-gram is in the captions of two images: a reranker learns what captions share")
    ngrams, counts = frequencies.hashes[common], frequencies.counts[common]
    frequencies = DocumentFrequencies(ngrams, counts, len(captions))
    some = captions[:: math.ceil(len(captions) / MOST_IMAGES)]
    vectors = mean_vectors(some, ngrams, frequencies)
    mean = vectors.mean(dim=0)
    _, _, directions = torch.svd_lowrank(vectors - mean, min(width, *vectors.shape), niter=3)
    lengths = np.array([len(caption) for own in captions for caption in own])
    # CIDEr-D compares lengths; which one people will write of an image is hardly known, so that all are compared with
    factors = [np.exp(-((length - lengths) ** 2) / (2 * SIGMA**2)).mean() for length in range(LONGEST + 1)]
    return {
        "ngrams": torch.from_numpy(ngrams.view(np.int64)),
        "counts": torch.from_numpy(counts.astype(np.int64)),
        "directions": directions.half(),
        "common": mean,
        "lengths": torch.tensor(factors, dtype=torch.float32),
    }


def mean_vectors(
    captions: list[list[list[int]]], ngrams: np.ndarray, frequencies: DocumentFrequencies
) -> torch.Tensor:
    """Return the mean tf-idf vector of each image's captions, `(images, ngrams)`."""
    image_of = np.array([image for image, own in enumerate(captions) for _ in own], dtype=np.int64)
    share = np.array([1 / len(own) for own in captions])
    weighed = WeighedCaptions([caption for own in captions for caption in own], frequencies)
    place = np.searchsorted(ngrams, weighed.hashes).clip(max=len(ngrams) - 1)
    known = ngrams[place] == weighed.hashes
    image = image_of[weighed.rows[known]]
    flat = image * len(ngrams) + place[known]
    values = np.bincount(flat, weighed.values[known] * share[image], len(captions) * len(ngrams))
    return torch.from_numpy(values.astype(np.float32)).view(len(captions), len(ngrams))


def coordinates(captions: list[list[list[int]]], tables: dict[str, torch.Tensor], counted: int) -> torch.Tensor:
    """Return the mean tf-idf vector of each image's captions along the directions, `(images, width)`.

    Args:
        counted: images that the tables were built from.
    """
    ngrams = tables["ngrams"].numpy().view(np.uint64)
    frequencies = DocumentFrequencies(ngrams, tables["counts"].numpy(), counted)
    blocks = [captions[start : start + 1000] for start in range(0, len(captions), 1000)]
    directions = tables["directions"].float()
    return torch.cat([(mean_vectors(own, ngrams, frequencies) - tables["common"]) @ directions for own in blocks])
