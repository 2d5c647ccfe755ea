"""`evaluate` module: METEOR 1.5; None where there is no Java."""

import datasets
import evaluate

from blipren.training.evaluation.metrics.captions import module_scores


class Meteor15(evaluate.Metric):
    """METEOR 1.5; None where there is no Java.

    Predictions are texts, references lists of texts, as many as each row has. `tokenizer`: auto, java, python, whitespace.
    """

    def _info(self):
        features = datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        )
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="Denkowski and Lavie 2014",
            inputs_description=self.__doc__,
            features=features,
        )

    def _compute(self, predictions, references, tokenizer="auto"):
        scores = module_scores(predictions, references, tokenizer, True)
        return {name: scores.corpus[name] for name in ("METEOR",)}
