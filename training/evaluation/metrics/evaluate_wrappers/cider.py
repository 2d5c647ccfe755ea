"""`evaluate` module: CIDEr-D, the agreement of a caption with several references."""

from blipren.training.evaluation.metrics import caption_scorers as scorers
from blipren.training.evaluation.metrics.evaluate_wrappers import base


class Cider(base.CaptionMetric):
    """CIDEr-D, the agreement of a caption with several references."""

    citation = "Vedantam et al. 2015, arXiv:1411.5726"
    score = scorers.score_cider
