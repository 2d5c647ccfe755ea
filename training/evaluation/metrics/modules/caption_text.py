"""`evaluate` module: what captions are like as texts: distinct n-grams, different captions, length, repetition."""

import datasets
import evaluate

from blipren.training.evaluation.metrics.captions import text_statistics
from blipren.training.evaluation.metrics.tokenizer import tokenize


class CaptionText(evaluate.Metric):
    """what captions are like as texts: distinct n-grams, different captions, length, repetition.

    Predictions are texts, references lists of texts, as many as each row has. The references are not looked at.
    """

    def _info(self):
        features = datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        )
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="Li et al. 2016, arXiv:1510.03055 (distinct-n)",
            inputs_description=self.__doc__,
            features=features,
        )

    def _compute(self, predictions, references, tokenizer="auto"):
        return text_statistics(tokenize(predictions, tokenizer))
