"""`evaluate` module: METEOR 1.5; None if there is no Java."""

from blipren.training.evaluation.metrics import scorers
from blipren.training.evaluation.metrics.evaluate_modules import base


class Meteor15(base.CaptionMetric):
    """METEOR 1.5; None if there is no Java."""

    citation = "Denkowski and Lavie 2014"
    score = scorers.score_meteor
