"""What the `evaluate` modules have in common."""

from __future__ import annotations

from collections.abc import Callable

import datasets
import evaluate

from blipren.training.evaluation.metrics.caption_scorers import MetricScores
from blipren.training.evaluation.metrics.tokenizer import tokenize

DETAILS = " details"


class TextMetric(evaluate.Metric):
    """A metric whose predictions are texts and whose references are lists of texts, as many as each row has.

    A module sets `citation`, and its docstring says what it computes.
    """

    citation: str

    def _info(self):
        features = {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation=self.citation,
            inputs_description=TextMetric.__doc__,
            features=datasets.Features(features),
        )


class CaptionMetric(TextMetric):
    """A metric of captions. A module sets `score`, one of `metrics.caption_scorers`."""

    score: Callable[[list[str], list[list[str]]], MetricScores]

    def _compute(self, predictions, references, tokenizer="auto", details=False):
        """Return the metric's values.

        Args:
            tokenizer: auto, java, python, whitespace.
            details: also return the `MetricScores`, under the class's name and " details".
        """
        tokens = iter(tokenize([*predictions, *(text for own in references for text in own)], tokenizer))
        captions = [next(tokens) for _ in predictions]
        scores = type(self).score(captions, [[next(tokens) for _ in own] for own in references])
        return scores.corpus | ({type(self).__name__ + DETAILS: scores} if details else {})
