"""`evaluate` module: CIDEr-D, the agreement of a caption with several references."""

import datasets
import evaluate

from blipren.training.evaluation.metrics.captions import module_scores


class Cider(evaluate.Metric):
    """CIDEr-D, the agreement of a caption with several references.

    Predictions are texts, references lists of texts, as many as each row has. `tokenizer`: auto, java, python, whitespace.
    """

    def _info(self):
        features = datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        )
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="Vedantam et al. 2015, arXiv:1411.5726",
            inputs_description=self.__doc__,
            features=features,
        )

    def _compute(self, predictions, references, tokenizer="auto"):
        scores = module_scores(predictions, references, tokenizer, False)
        return {name: scores.corpus[name] for name in ("CIDEr",)}
