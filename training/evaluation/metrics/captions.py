"""Caption metrics: CIDEr-D, BLEU-1 to BLEU-4, ROUGE-L and METEOR, and statistics of the texts.

`caption_metrics` returns the numbers. `score_captions` also returns the scores of each image, the tokenizer, what could
not be computed and why, and the statistics for confidence intervals. Both compute the metrics by `evaluate.combine` over
the modules in `evaluate_wrappers/`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import evaluate
import numpy as np

from blipren.training.errors import UserError
from blipren.training.evaluation.metrics.bootstrap import Statistic, interval, mean_statistic
from blipren.training.evaluation.metrics.caption_scorers import MetricScores
from blipren.training.evaluation.metrics.evaluate_wrappers.base import DETAILS
from blipren.training.evaluation.metrics.evaluate_wrappers.caption_bleu import CaptionBleu
from blipren.training.evaluation.metrics.evaluate_wrappers.caption_text import CaptionText
from blipren.training.evaluation.metrics.evaluate_wrappers.cider import Cider
from blipren.training.evaluation.metrics.evaluate_wrappers.meteor_1_5 import Meteor15
from blipren.training.evaluation.metrics.evaluate_wrappers.rouge_l import RougeL
from blipren.training.evaluation.metrics.tokenizer import choose_tokenizer, tokenize

logger = logging.getLogger(__name__)

CAPTION_METRICS = ("CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "METEOR")
NO_JAVA = "METEOR needs Java, which is not on the PATH"


@dataclass
class CaptionScores:
    """Scores of a set of captions.

    Attributes:
        corpus: metric -> value of the whole set; None if it cannot be computed (see `notes`).
        per_image: metric -> id -> value, for the metrics that a single image has.
        statistics: metric -> `Statistic` for intervals and paired comparison, images in the order of `ids`.
        tokenizer: `java`, `python` or `whitespace`.
        notes: what was left out and why.
    """

    ids: list
    corpus: dict[str, float | None]
    per_image: dict[str, dict]
    statistics: dict[str, Statistic]
    tokenizer: str
    notes: list[str] = field(default_factory=list)

    def intervals(self, resamples: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
        """Return the 95% bootstrap interval over images of each metric."""
        return {name: interval(s, resamples, seed) for name, s in self.statistics.items()}


@functools.cache
def combined_metrics(meteor: bool) -> evaluate.CombinedEvaluations:
    """Return the caption metrics as one `evaluate` module. METEOR starts a Java program, which takes ten seconds."""
    modules = [Cider, CaptionBleu, RougeL, *([Meteor15] if meteor else []), CaptionText]
    return evaluate.combine([module(keep_in_memory=True) for module in modules])


def _check(predictions: Mapping, references: Mapping) -> list:
    """Return the ids in order. Raises `UserError` if predictions and references do not fit."""
    if not predictions:
        raise UserError("there are no predictions to score")
    if predictions.keys() != references.keys():
        odd = sorted(map(str, predictions.keys() ^ references.keys()))
        raise UserError(
            f"predictions and references must have the same ids; {len(odd)} are in one of them only, such as {odd[0]!r}"
        )
    ids = list(predictions)
    for key in ids:
        if not isinstance(predictions[key], str):
            raise UserError(f"the prediction of {key!r} is {type(predictions[key]).__name__}; it must be one text")
        if isinstance(references[key], str) or not references[key]:
            raise UserError(
                f"the references of {key!r} are {references[key]!r}; they must be a list of at least one text"
            )
    return ids


def score_captions(
    predictions: Mapping[object, str],
    references: Mapping[object, Sequence[str]],
    tokenizer: str = "auto",
    ended_by_eos: Mapping[object, bool] | None = None,
    meteor: bool = True,
) -> CaptionScores:
    """Score captions against their references.

    Args:
        predictions: id -> caption. references: id -> reference captions, the same ids.
        tokenizer: `auto`, `java`, `python`, `whitespace`: see `tokenizer.tokenize`.
        ended_by_eos: id -> whether the caption ended by itself; adds the metric `cut_off`.
        meteor: compute METEOR, if there is Java.

    Raises:
        UserError: ids differ, an image has no reference, or Java fails.
    """
    ids = _check(predictions, references)
    tokenizer = choose_tokenizer(tokenizer)
    # one run of the tokenizer for all texts: Java takes a second to start
    tokens = iter(tokenize([predictions[k] for k in ids] + [text for k in ids for text in references[k]], tokenizer))
    captions = [next(tokens) for _ in ids]
    targets = [[next(tokens) for _ in references[k]] for k in ids]
    found = combined_metrics(meteor).compute(
        predictions=captions, references=targets, tokenizer="whitespace", details=True
    )
    parts: list[MetricScores] = [value for name, value in found.items() if name.endswith(DETAILS)]
    corpus = dict.fromkeys(CAPTION_METRICS) | {k: v for k, v in found.items() if not k.endswith(DETAILS)}
    per_image = {name: values for part in parts for name, values in part.per_image.items()}
    statistics = {name: statistic for part in parts for name, statistic in part.statistics.items()}
    if ended_by_eos is not None:
        cut_off = [not ended_by_eos[k] for k in ids]
        corpus["cut_off"], statistics["cut_off"] = float(np.mean(cut_off)), mean_statistic(cut_off)
    notes = []
    if not meteor:
        notes.append("METEOR was not asked for")
    elif corpus["METEOR"] is None:
        notes.append(NO_JAVA)
    by_id = {name: {k: float(v) for k, v in zip(ids, values)} for name, values in per_image.items()}
    return CaptionScores(ids, corpus, by_id, statistics, tokenizer, notes)


def caption_metrics(
    predictions: Mapping[object, str], references: Mapping[object, Sequence[str]], tokenizer: str = "auto"
) -> dict[str, float | None]:
    """Compute `CIDEr` (CIDEr-D), `BLEU-1` to `BLEU-4`, `ROUGE-L` and `METEOR` of {id: caption}, {id: [reference, ...]}.

    METEOR is None without Java. The tokens are those of Stanford's PTB tokenizer, or without Java of its equal in Python;
    the log says which.
    """
    scores = score_captions(predictions, references, tokenizer)
    logger.info(
        "caption metrics after the %s tokenizer; %s", scores.tokenizer, "; ".join(scores.notes) or "all computed"
    )
    return {name: scores.corpus[name] for name in CAPTION_METRICS}
