"""`evaluate` module: ROUGE-L, the longest common subsequence, as captioning uses it (beta 1.2)."""

import datasets
import evaluate

from blipren.training.evaluation.metrics.captions import module_scores


class RougeL(evaluate.Metric):
    """ROUGE-L, the longest common subsequence, as captioning uses it (beta 1.2).

    Predictions are texts, references lists of texts, as many as each row has. `tokenizer`: auto, java, python, whitespace.
    """

    def _info(self):
        features = datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        )
        return evaluate.MetricInfo(
            description=self.__doc__, citation="Lin 2004", inputs_description=self.__doc__, features=features
        )

    def _compute(self, predictions, references, tokenizer="auto"):
        scores = module_scores(predictions, references, tokenizer, False)
        return {name: scores.corpus[name] for name in ("ROUGE-L",)}
