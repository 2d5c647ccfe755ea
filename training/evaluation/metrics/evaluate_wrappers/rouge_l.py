"""`evaluate` module: ROUGE-L, the longest common subsequence, with beta 1.2 as captioning uses it."""

from blipren.training.evaluation.metrics import caption_scorers as scorers
from blipren.training.evaluation.metrics.evaluate_wrappers import base


class RougeL(base.CaptionMetric):
    """ROUGE-L, the longest common subsequence, with beta 1.2 as captioning uses it."""

    citation = "Lin 2004"
    score = scorers.score_rouge_l
