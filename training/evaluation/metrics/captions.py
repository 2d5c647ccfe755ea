"""Caption metrics: CIDEr-D, BLEU-1..4, ROUGE-L and METEOR by `pycocoevalcap`, and what a reader wants besides.

`caption_metrics` gives the numbers, `score_captions` also those of each image, the tokenizer that was used, what could
not be computed and why, and the statistics that confidence intervals are made of.
"""

from __future__ import annotations

import functools
import logging
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor import meteor
from pycocoevalcap.rouge.rouge import Rouge

from blipren.training.errors import UserError
from blipren.training.evaluation.metrics.bootstrap import Statistic, interval, mean_statistic
from blipren.training.evaluation.metrics.tokenizer import choose_tokenizer, java_available, tokenize

logger = logging.getLogger(__name__)

CAPTION_METRICS = ("CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "METEOR")
NO_JAVA = "METEOR needs Java, which is not on the PATH"


@dataclass
class CaptionScores:
    """Scores of a set of captions.

    Attributes:
        corpus: metric -> value over the whole set; None where it cannot be computed (see `notes`).
        per_image: metric -> id -> value, for the metrics that an image has alone.
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
        """metric -> 95% bootstrap interval over images."""
        return {name: interval(s, resamples, seed) for name, s in self.statistics.items()}


class _Meteor(meteor.Meteor):
    """METEOR 1.5 as pycocoevalcap runs it, in UTF-8 whatever the locale, and with the statistics kept."""

    def __init__(self):
        jar = Path(meteor.__file__).parent / meteor.METEOR_JAR
        self.meteor_cmd = ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", str(jar)]
        self.meteor_cmd += ["-", "-", "-stdio", "-l", "en", "-norm"]
        pipe = subprocess.PIPE
        # stderr is thrown away: nobody reads that pipe, and a full one would stop the program
        self.meteor_p = subprocess.Popen(
            self.meteor_cmd, cwd=jar.parent, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
        )
        self.lock = threading.Lock()
        self.stats: list[list[float]] = []

    def _stat(self, hypothesis_str, reference_list):
        stat = super()._stat(hypothesis_str, reference_list)
        self.stats.append([float(number) for number in stat.split()])
        return stat


@functools.cache
def _meteor_program() -> _Meteor:
    """One program for the whole process: it takes seconds to load its paraphrases."""
    return _Meteor()


def _meteor(hypotheses: list[str], references: list[list[str]]) -> tuple[float, list[float], np.ndarray]:
    """Corpus METEOR, METEOR of each image, statistics [images, 23]."""
    program = _meteor_program()
    program.stats = []
    keys = range(len(hypotheses))
    try:
        score, scores = program.compute_score({k: references[k] for k in keys}, {k: [hypotheses[k]] for k in keys})
    except (ValueError, OSError) as error:
        _meteor_program.cache_clear()
        raise UserError(
            f"METEOR's Java program stopped while scoring ({error}); repair Java, or take it off the PATH to go without"
        ) from error
    rows = np.array(program.stats)
    # METEOR counts no chunk where a caption equals its reference, per image and in the sum
    perfect = (rows[:, 20] == 1) & (rows[:, 21] == rows[:, 0]) & (rows[:, 22] == rows[:, 1])
    rows[perfect, 20] = 0
    return score, scores, rows


def meteor_formula(sums: np.ndarray) -> np.ndarray:
    """METEOR 1.5 for English from summed statistics [..., 23] (Denkowski and Lavie 2014, equations 1 to 3).

    Columns: length of caption and reference, their function words; for each of the four matchers (exact, stem, synonym,
    paraphrase) matched content words and function words (caption, reference each); chunks; matched words.
    """
    alpha, beta, gamma, delta = 0.85, 0.2, 0.6, 0.75
    matches = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)  # [..., matcher, content c/r and function c/r]
    matches = np.einsum("...mk,m->...k", matches, np.array([1.0, 0.6, 0.8, 0.6]))

    def weighted(content, function):
        return delta * content + (1 - delta) * function

    with np.errstate(divide="ignore", invalid="ignore"):  # an empty caption has no precision, and scores 0
        precision = weighted(matches[..., 0], matches[..., 2]) / weighted(sums[..., 0] - sums[..., 2], sums[..., 2])
        recall = weighted(matches[..., 1], matches[..., 3]) / weighted(sums[..., 1] - sums[..., 3], sums[..., 3])
        mean = precision * recall / (alpha * precision + (1 - alpha) * recall)
        fragmentation = sums[..., 20] / ((sums[..., 21] + sums[..., 22]) / 2)
        return np.nan_to_num(mean * (1 - gamma * fragmentation**beta))


def bleu_formula(order: int):
    """Corpus BLEU of an order from summed [caption length, reference length, 4 guesses, 4 matches]; no smoothing.

    The two tiny constants are the reference implementation's, so that values agree to the last digit.
    """

    def formula(sums: np.ndarray) -> np.ndarray:
        precisions = (sums[..., 6:] + 1e-15) / (sums[..., 2:6] + 1e-9)
        bleu = np.prod(precisions[..., :order], axis=-1) ** (1.0 / order)
        ratio = (sums[..., 0] + 1e-15) / (sums[..., 1] + 1e-9)
        return bleu * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)

    return formula


def _bleu(hypotheses: list[str], references: list[list[str]]) -> tuple[list[float], list[list[float]], np.ndarray]:
    """BLEU-1..4 of the corpus and of each image ([order][image]), statistics [images, 10]."""
    scorer = BleuScorer(n=4)
    for hypothesis, image_references in zip(hypotheses, references):
        scorer += (hypothesis, image_references)
    corpus, per_image = scorer.compute_score(option="closest", verbose=0)
    rows = []
    for counts in scorer.ctest:
        length = counts["testlen"]
        closest = min((abs(r - length), r) for r in counts["reflen"])[1]
        rows.append([length, closest, *counts["guess"], *counts["correct"]])
    return corpus, per_image, np.array(rows, dtype=np.float64)


def _repeats(tokens: Sequence[str]) -> bool:
    """Whether a word follows itself, or three words in a row come twice."""
    trigrams = list(zip(tokens, tokens[1:], tokens[2:]))
    return len(set(trigrams)) < len(trigrams) or any(a == b for a, b in zip(tokens, tokens[1:]))


def text_statistics(tokenized: Sequence[str], ended_by_eos: Sequence[bool] | None = None) -> dict[str, float]:
    """What the captions are like as texts, whatever the references.

    Args:
        tokenized: captions with tokens joined by spaces.
        ended_by_eos: whether each caption ended by itself; without it `cut_off` is left out.

    Returns:
        `distinct-1`, `distinct-2` (different n-grams over all n-grams, Li et al. 2016), `unique_captions` (share of
        different captions), `length` (mean tokens), `repetition` (share of captions that repeat a word or a trigram),
        `cut_off` (share of captions cut off by the length limit).
    """
    captions = [caption.split() for caption in tokenized]
    result = {}
    for n in (1, 2):
        ngrams = [gram for tokens in captions for gram in zip(*(tokens[i:] for i in range(n)))]
        result[f"distinct-{n}"] = len(set(ngrams)) / max(1, len(ngrams))
    result["unique_captions"] = len(set(tokenized)) / max(1, len(captions))
    result["length"] = float(np.mean([len(tokens) for tokens in captions]))
    result["repetition"] = float(np.mean([_repeats(tokens) for tokens in captions]))
    if ended_by_eos is not None:
        result["cut_off"] = float(np.mean([not ended for ended in ended_by_eos]))
    return result


def _check(predictions: Mapping, references: Mapping) -> list:
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
    """Scores captions against their references.

    Args:
        predictions: id -> caption. references: id -> reference captions, the same ids.
        tokenizer: `auto`, `java`, `python`, `whitespace`: see `tokenizer.tokenize`.
        ended_by_eos: id -> whether the caption ended by itself.
        meteor: False leaves METEOR out, which takes ten seconds to start.

    Raises:
        UserError: ids differ, an image has no reference, or Java fails.
    """
    ids = _check(predictions, references)
    tokenizer = choose_tokenizer(tokenizer)
    flat = [predictions[k] for k in ids] + [text for k in ids for text in references[k]]
    tokens = iter(tokenize(flat, tokenizer))
    hypotheses = [next(tokens) for _ in ids]
    targets = [[next(tokens) for _ in references[k]] for k in ids]

    bleu, bleu_images, bleu_rows = _bleu(hypotheses, targets)
    by_number = dict(enumerate(targets)), {i: [h] for i, h in enumerate(hypotheses)}
    cider, cider_images = Cider().compute_score(*by_number)
    rouge, rouge_images = Rouge().compute_score(*by_number)
    corpus: dict[str, float | None] = {"CIDEr": float(cider)}
    images = {"CIDEr": cider_images, "ROUGE-L": rouge_images}
    statistics = {"CIDEr": mean_statistic(cider_images)}
    for order in range(1, 5):
        corpus[f"BLEU-{order}"] = float(bleu[order - 1])
        images[f"BLEU-{order}"] = bleu_images[order - 1]
        statistics[f"BLEU-{order}"] = Statistic(bleu_rows, bleu_formula(order))
    corpus["ROUGE-L"], statistics["ROUGE-L"] = float(rouge), mean_statistic(rouge_images)
    corpus["METEOR"], notes = None, []
    if not meteor:
        notes.append("METEOR was not asked for")
    elif not java_available():
        notes.append(NO_JAVA)
    else:
        corpus["METEOR"], images["METEOR"], rows = _meteor(hypotheses, targets)
        statistics["METEOR"] = Statistic(rows, meteor_formula)
    ended = None if ended_by_eos is None else [ended_by_eos[k] for k in ids]
    corpus.update(text_statistics(hypotheses, ended))
    statistics["length"] = mean_statistic([len(h.split()) for h in hypotheses])
    statistics["repetition"] = mean_statistic([_repeats(h.split()) for h in hypotheses])
    if ended is not None:
        statistics["cut_off"] = mean_statistic([not e for e in ended])
    per_image = {name: {k: float(v) for k, v in zip(ids, values)} for name, values in images.items()}
    return CaptionScores(ids, corpus, per_image, statistics, tokenizer, notes)


def caption_metrics(
    predictions: Mapping[object, str], references: Mapping[object, Sequence[str]], tokenizer: str = "auto"
) -> dict[str, float | None]:
    """{id: caption}, {id: [reference, ...]} -> `CIDEr` (CIDEr-D), `BLEU-1`..`BLEU-4`, `ROUGE-L`, `METEOR`.

    METEOR is None without Java. The tokens come from Stanford's PTB tokenizer, or without Java from its equal in Python;
    which one is logged.
    """
    scores = score_captions(predictions, references, tokenizer)
    logger.info(
        "caption metrics after the %s tokenizer; %s", scores.tokenizer, "; ".join(scores.notes) or "all computed"
    )
    return {name: scores.corpus[name] for name in CAPTION_METRICS}


def module_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str, meteor: bool
) -> CaptionScores:
    """`score_captions` for rows without ids, as `evaluate` modules get them."""
    return score_captions(dict(enumerate(predictions)), dict(enumerate(references)), tokenizer, meteor=meteor)
