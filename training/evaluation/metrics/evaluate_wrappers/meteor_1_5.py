"""`evaluate` module: METEOR 1.5; None if there is no Java."""

from blipren.training.evaluation.metrics import caption_scorers as scorers
from blipren.training.evaluation.metrics.evaluate_wrappers import base


class Meteor15(base.CaptionMetric):
    """METEOR 1.5; None if there is no Java."""

    citation = "Denkowski and Lavie 2014"
    score = scorers.score_meteor
