"""`evaluate` module: Corpus BLEU-1 to BLEU-4 against the closest reference length."""

from blipren.training.evaluation.metrics import caption_scorers as scorers
from blipren.training.evaluation.metrics.evaluate_wrappers import base


class CaptionBleu(base.CaptionMetric):
    """Corpus BLEU-1 to BLEU-4 against the closest reference length."""

    citation = "Papineni et al. 2002"
    score = scorers.score_bleu
