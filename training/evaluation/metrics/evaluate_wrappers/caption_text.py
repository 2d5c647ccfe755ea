"""`evaluate` module: Statistics of captions as texts: distinct n-grams, different captions, length, repetition."""

from blipren.training.evaluation.metrics import caption_scorers as scorers
from blipren.training.evaluation.metrics.evaluate_wrappers import base


class CaptionText(base.CaptionMetric):
    """Statistics of captions as texts: distinct n-grams, different captions, length, repetition."""

    citation = "Li et al. 2016, arXiv:1510.03055 (distinct-n)"
    score = scorers.score_texts
