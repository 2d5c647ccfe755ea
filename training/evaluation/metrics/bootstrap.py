"""Bootstrap confidence intervals over images.

A metric is a table of per-image statistics [images, columns] and a function of their column sums: the mean of a score
is `sum / n`, corpus BLEU is a function of summed n-gram counts. Resampling images is one matrix product, and the value of
the whole set and of each sample come from the same formula. CIDEr's document frequencies stay those of the whole set.
(Efron 1979; for captions, Koehn 2004.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Statistic:
    """A metric over images.

    Attributes:
        rows: per-image statistics [images, columns].
        formula: column sums [..., columns] -> metric [...].
    """

    rows: np.ndarray
    formula: Callable[[np.ndarray], np.ndarray]

    @property
    def value(self) -> float:
        """The metric over all images."""
        return float(self.formula(self.rows.sum(axis=0)))


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def mean_statistic(scores, weights=None) -> Statistic:
    """Return the (weighted) mean of one score an image. Scores that are None or NaN are left out."""
    scores = np.array([np.nan if s is None else s for s in scores], dtype=np.float64)
    weights = np.ones_like(scores) if weights is None else np.asarray(weights, dtype=np.float64)
    weights = np.where(np.isnan(scores), 0.0, weights)
    return Statistic(np.stack([np.nan_to_num(scores) * weights, weights], axis=1), _ratio)


def grouped_statistic(scores, groups) -> Statistic:
    """Return the mean over all scores, resampled by group: the questions about one image are drawn together."""
    sums: dict = {}
    for score, group in zip(scores, groups, strict=True):
        total, count = sums.get(group, (0.0, 0))
        sums[group] = (total + float(score), count + 1)
    return Statistic(np.array(list(sums.values()), dtype=np.float64), _ratio)


def resample_counts(images: int, resamples: int, seed: int) -> np.ndarray:
    """Return how often each image is drawn in each sample, [resamples, images]. Equal arguments give equal draws."""
    if images < 1:
        raise ValueError(f"cannot resample {images} images")
    generator = np.random.default_rng(seed)
    return generator.multinomial(images, np.full(images, 1.0 / images), size=resamples)


def resampled_values(statistic: Statistic, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Return the metric of each sample, [resamples]. Samples without a single counted image are left out."""
    values = []
    images = len(statistic.rows)
    # in slices, so that 100,000 images do not need a gigabyte
    step = max(1, min(resamples, 20_000_000 // images))
    for start in range(0, resamples, step):
        counts = resample_counts(images, min(step, resamples - start), seed + start)
        with np.errstate(divide="ignore", invalid="ignore"):
            values.append(np.asarray(statistic.formula(counts @ statistic.rows), dtype=np.float64))
    values = np.concatenate(values)
    return values[np.isfinite(values)]


def interval(
    statistic: Statistic, resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a metric, (low, high)."""
    values = resampled_values(statistic, resamples, seed)
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class PairedDifference:
    """B minus A of one metric on the same images.

    Attributes:
        difference: on all images.
        low, high: bootstrap interval of the difference.
        p_value: two-sided share of samples on the other side of zero (at least 1 / resamples).
    """

    a: float
    b: float
    difference: float
    low: float
    high: float
    p_value: float


def paired_difference(
    a: Statistic, b: Statistic, resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> PairedDifference:
    """Compute the paired bootstrap of two metrics over the same images in the same order."""
    if len(a.rows) != len(b.rows):
        raise ValueError(f"a paired comparison needs the same images: {len(a.rows)} against {len(b.rows)}")
    joined = Statistic(
        np.concatenate([a.rows, b.rows], axis=1),
        lambda sums: b.formula(sums[..., a.rows.shape[1] :]) - a.formula(sums[..., : a.rows.shape[1]]),
    )
    values = resampled_values(joined, resamples, seed)
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    tail = min(np.mean(values <= 0), np.mean(values >= 0))
    p_value = min(1.0, max(2 * float(tail), 1.0 / len(values)))
    return PairedDifference(a.value, b.value, joined.value, float(low), float(high), p_value)
