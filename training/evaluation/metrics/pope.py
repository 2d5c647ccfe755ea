"""POPE: yes/no questions about objects that are in the image and objects that are not (Li et al. 2023, arXiv:2305.10355).

Each image has as many questions about absent objects as about present ones. The absent objects are drawn at random, from
the most frequent objects of the set, or from the objects that most often occur together with the present ones. The answer
is the likelier of "yes" and "no" as a whole answer, so that a model that never generates either is measured too.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blipren.training.evaluation.metrics.bootstrap import grouped_statistic, interval

STRATEGIES = ("random", "popular", "adversarial")
QUESTION = "Is there {article} {object}?"


@dataclass(frozen=True)
class PopeQuestion:
    """One question. `answer` says whether the object is in the image, `strategy` how the absent objects were chosen."""

    image: str
    object: str
    answer: bool
    strategy: str

    @property
    def text(self) -> str:
        """The question in words."""
        article = "an" if self.object[0] in "aeiou" else "a"
        return QUESTION.format(article=article, object=self.object)


def pope_questions(objects: Mapping[str, Sequence[str]], per_image: int = 3, seed: int = 0) -> list[PopeQuestion]:
    """Return balanced questions for each strategy: up to `per_image` present objects an image, and as many absent ones.

    Args:
        objects: image id -> names of the objects in it. Images without an object are left out.
    """
    there = {image: sorted(set(names)) for image, names in objects.items() if names}
    frequency = Counter(name for names in there.values() for name in names)
    together: dict[str, Counter] = {name: Counter() for name in frequency}
    for names in there.values():
        for name in names:
            together[name].update(n for n in names if n != name)
    questions = []
    for image, names in there.items():
        for strategy in STRATEGIES:
            rng = random.Random(f"{seed}/{image}/{strategy}")
            present = sorted(rng.sample(names, min(per_image, len(names))))
            absent = sorted(set(frequency) - set(names))
            if strategy == "random":
                rng.shuffle(absent)
            elif strategy == "popular":
                absent.sort(key=lambda name: (-frequency[name], name))
            else:
                absent.sort(key=lambda name: (-sum(together[p][name] for p in names), -frequency[name], name))
            absent = absent[: len(present)]
            for name, no in zip(present, absent):
                questions.append(PopeQuestion(image, name, True, strategy))
                questions.append(PopeQuestion(image, no, False, strategy))
    return questions


def pope_scores(
    questions: Sequence[PopeQuestion], said_yes: Sequence[bool], resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Return for each strategy accuracy with its interval, precision, recall and F1 of "yes", share of "yes", questions."""
    table = {}
    for strategy in STRATEGIES:
        own = [(q, yes) for q, yes in zip(questions, said_yes, strict=True) if q.strategy == strategy]
        pairs = [(q.answer, yes) for q, yes in own]
        if not pairs:
            continue
        true_yes = sum(answer and yes for answer, yes in pairs)
        all_yes, all_true = sum(yes for _, yes in pairs), sum(answer for answer, _ in pairs)
        accuracy = grouped_statistic([answer == yes for answer, yes in pairs], [q.image for q, _ in own])
        precision, recall = true_yes / max(1, all_yes), true_yes / max(1, all_true)
        table[strategy] = {
            "accuracy": accuracy.value,
            "interval": interval(accuracy, resamples, seed),
            "precision": precision,
            "recall": recall,
            "F1": 2 * precision * recall / max(1e-12, precision + recall),
            "yes_share": all_yes / len(pairs),
            "questions": len(pairs),
        }
    return table
