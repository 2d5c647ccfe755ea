"""`evaluate` module: visual question answering: exact accuracy and the VQA soft score."""

import datasets
import evaluate

from blipren.training.evaluation.metrics.vqa import vqa_metrics


class VqaAccuracy(evaluate.Metric):
    """visual question answering: exact accuracy and the VQA soft score.

    Predictions are texts, references lists of texts, as many as each row has.
    """

    def _info(self):
        features = datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        )
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="Antol et al. 2015, arXiv:1505.00468",
            inputs_description=self.__doc__,
            features=features,
        )

    def _compute(self, predictions, references):
        return vqa_metrics(dict(enumerate(predictions)), dict(enumerate(references)))
