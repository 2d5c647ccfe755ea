"""`evaluate` module: visual question answering: exact accuracy and the VQA soft score."""

from blipren.training.evaluation.metrics.evaluate_wrappers import base
from blipren.training.evaluation.metrics.vqa import vqa_metrics


class VqaAccuracy(base.TextMetric):
    """Visual question answering: exact accuracy and the VQA soft score."""

    citation = "Antol et al. 2015, arXiv:1505.00468"

    def _compute(self, predictions, references):
        return vqa_metrics(dict(enumerate(predictions)), dict(enumerate(references)))
