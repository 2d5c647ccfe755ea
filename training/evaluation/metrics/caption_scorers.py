"""Scorers of tokenised captions: CIDEr-D, BLEU, ROUGE-L and METEOR by `pycocoevalcap`, and statistics of the texts.

A scorer takes captions and their references, tokens joined by one space, and returns `MetricScores`. The `evaluate`
modules in `evaluate_wrappers/` are made of these functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from blipren.training.evaluation.metrics.bootstrap import Statistic, mean_statistic
from blipren.training.evaluation.metrics.meteor import compute_meteor, meteor_formula
from blipren.training.evaluation.metrics.tokenizer import java_available

Captions = Sequence[str]
References = Sequence[Sequence[str]]


@dataclass
class MetricScores:
    """What a scorer returns.

    Attributes:
        corpus: metric -> value of the whole set, None if it cannot be computed.
        per_image: metric -> value of each image, for the metrics that a single image has.
        statistics: metric -> `Statistic`, for confidence intervals and paired comparison.
    """

    corpus: dict[str, float | None]
    per_image: dict[str, Sequence[float]] = field(default_factory=dict)
    statistics: dict[str, Statistic] = field(default_factory=dict)


def score_cider(captions: Captions, references: References) -> MetricScores:
    """Compute CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726)."""
    corpus, per_image = Cider().compute_score(*_by_number(captions, references))
    return MetricScores({"CIDEr": float(corpus)}, {"CIDEr": per_image}, {"CIDEr": mean_statistic(per_image)})


def score_rouge_l(captions: Captions, references: References) -> MetricScores:
    """Compute ROUGE-L with beta 1.2, as captioning uses it (Lin 2004)."""
    corpus, per_image = Rouge().compute_score(*_by_number(captions, references))
    return MetricScores({"ROUGE-L": float(corpus)}, {"ROUGE-L": per_image}, {"ROUGE-L": mean_statistic(per_image)})


def _by_number(captions: Captions, references: References) -> tuple[dict, dict]:
    """Return references and captions as pycocoevalcap takes them."""
    return {i: list(own) for i, own in enumerate(references)}, {i: [caption] for i, caption in enumerate(captions)}


def score_bleu(captions: Captions, references: References) -> MetricScores:
    """Compute corpus BLEU-1 to BLEU-4 against the closest reference length (Papineni et al. 2002)."""
    scorer = BleuScorer(n=4)
    for caption, own in zip(captions, references):
        scorer += (caption, list(own))
    corpus, per_image = scorer.compute_score(option="closest", verbose=0)
    rows = []
    for counts in scorer.ctest:
        length = counts["testlen"]
        closest = min((abs(r - length), r) for r in counts["reflen"])[1]
        rows.append([length, closest, *counts["guess"], *counts["correct"]])
    table = np.array(rows, dtype=np.float64)  # [images, 10]
    names = [f"BLEU-{order}" for order in range(1, 5)]
    return MetricScores(
        {name: float(value) for name, value in zip(names, corpus)},
        dict(zip(names, per_image)),
        {name: Statistic(table, bleu_formula(order)) for order, name in enumerate(names, start=1)},
    )


def bleu_formula(order: int):
    """Return the function from summed [caption length, reference length, 4 guesses, 4 matches] to corpus BLEU.

    There is no smoothing. The two tiny constants are the reference implementation's, so that values agree to the last
    digit.
    """

    def formula(sums: np.ndarray) -> np.ndarray:
        precisions = (sums[..., 6:] + 1e-15) / (sums[..., 2:6] + 1e-9)
        bleu = np.prod(precisions[..., :order], axis=-1) ** (1.0 / order)
        ratio = (sums[..., 0] + 1e-15) / (sums[..., 1] + 1e-9)
        return bleu * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)

    return formula


def score_meteor(captions: Captions, references: References) -> MetricScores:
    """Compute METEOR 1.5 (Denkowski and Lavie 2014); None if there is no Java."""
    if not java_available():
        return MetricScores({"METEOR": None})
    corpus, per_image, rows = compute_meteor(list(captions), [list(own) for own in references])
    return MetricScores({"METEOR": corpus}, {"METEOR": per_image}, {"METEOR": Statistic(rows, meteor_formula)})


def _repeats(tokens: Sequence[str]) -> bool:
    """Whether a word follows itself, or a sequence of three words occurs twice."""
    trigrams = list(zip(tokens, tokens[1:], tokens[2:]))
    return len(set(trigrams)) < len(trigrams) or any(a == b for a, b in zip(tokens, tokens[1:]))


def score_texts(captions: Captions, references: References = ()) -> MetricScores:
    """Compute statistics of the captions as texts. The references are not used.

    Returns:
        `distinct-1`, `distinct-2` (different n-grams over all n-grams, Li et al. 2016, arXiv:1510.03055),
        `unique_captions` (share of different captions), `length` (mean number of tokens), `repetition` (share of
        captions that repeat a word or a trigram). Only the last two have statistics for intervals: a bootstrap sample
        holds captions twice.
    """
    split = [caption.split() for caption in captions]
    corpus: dict[str, float | None] = {}
    for n in (1, 2):
        ngrams = [gram for tokens in split for gram in zip(*(tokens[i:] for i in range(n)))]
        corpus[f"distinct-{n}"] = len(set(ngrams)) / max(1, len(ngrams))
    corpus["unique_captions"] = len(set(captions)) / max(1, len(captions))
    lengths, repetitions = [len(tokens) for tokens in split], [_repeats(tokens) for tokens in split]
    corpus |= {"length": float(np.mean(lengths)), "repetition": float(np.mean(repetitions))}
    return MetricScores(
        corpus, statistics={"length": mean_statistic(lengths), "repetition": mean_statistic(repetitions)}
    )
