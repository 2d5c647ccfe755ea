"""`evaluate` module: corpus BLEU-1 to BLEU-4 against the closest reference length."""

import datasets
import evaluate

from blipren.training.evaluation.metrics.captions import module_scores


class CaptionBleu(evaluate.Metric):
    """corpus BLEU-1 to BLEU-4 against the closest reference length.

    Predictions are texts, references lists of texts, as many as each row has. `tokenizer`: auto, java, python, whitespace.
    """

    def _info(self):
        features = datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        )
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="Papineni et al. 2002",
            inputs_description=self.__doc__,
            features=features,
        )

    def _compute(self, predictions, references, tokenizer="auto"):
        scores = module_scores(predictions, references, tokenizer, False)
        return {name: scores.corpus[name] for name in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")}
