"""METEOR 1.5 through its Java program, which pycocoevalcap ships."""

from __future__ import annotations

import functools
import subprocess
import threading
from pathlib import Path

import numpy as np
from pycocoevalcap.meteor import meteor

from blipren.training.errors import UserError


class MeteorProgram(meteor.Meteor):
    """METEOR 1.5 as pycocoevalcap runs it, with UTF-8 in any locale, and with the statistics of each image kept."""

    def __init__(self):
        jar = Path(meteor.__file__).parent / meteor.METEOR_JAR
        self.meteor_cmd = ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", str(jar)]
        self.meteor_cmd += ["-", "-", "-stdio", "-l", "en", "-norm"]
        pipe = subprocess.PIPE
        # stderr is discarded: nothing reads that pipe, and the program would stop when it is full
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
def start_program() -> MeteorProgram:
    """Start the program, once a process: loading its paraphrases takes seconds."""
    return MeteorProgram()


def compute_meteor(hypotheses: list[str], references: list[list[str]]) -> tuple[float, list[float], np.ndarray]:
    """Compute METEOR of tokenised captions.

    Returns:
        The value of the corpus, the value of each image, and statistics [images, 23] (see `meteor_formula`).

    Raises:
        UserError: the Java program stopped.
    """
    program = start_program()
    program.stats = []
    keys = range(len(hypotheses))
    try:
        score, scores = program.compute_score({k: references[k] for k in keys}, {k: [hypotheses[k]] for k in keys})
    except (ValueError, OSError) as error:
        start_program.cache_clear()
        raise UserError(
            f"METEOR's Java program stopped while scoring ({error}); repair Java, or take it off the PATH to go without"
        ) from error
    rows = np.array(program.stats)
    # METEOR counts no chunk where a caption equals its reference, per image and in the sum
    perfect = (rows[:, 20] == 1) & (rows[:, 21] == rows[:, 0]) & (rows[:, 22] == rows[:, 1])
    rows[perfect, 20] = 0
    return score, scores, rows


def meteor_formula(sums: np.ndarray) -> np.ndarray:
    """Compute METEOR 1.5 for English from summed statistics [..., 23] (Denkowski and Lavie 2014, equations 1 to 3).

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
