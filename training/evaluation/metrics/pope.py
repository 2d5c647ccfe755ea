"""POPE: yes/no questions about objects that are there and objects that are not (Li et al. 2023, arXiv:2305.10355).

For every image as many absent objects are asked about as present ones, drawn at random, from the most frequent objects
of the set, or from those that most often occur together with the present ones. The answer is the likelier of "yes" and
"no" as a whole answer, so that a model which never says either is measured too.
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
    """One question: `answer` is whether the object is there; `strategy` how an absent one was chosen."""

    image: str
    object: str
    answer: bool
    strategy: str

    @property
    def text(self) -> str:
        article = "an" if self.object[0] in "aeiou" else "a"
        return QUESTION.format(article=article, object=self.object)


def scene_objects(scene_json: str) -> list[str]:
    """ "red circle", ... of a drawn scene."""
    from blipren.training.quickstart.scenes import Scene

    return sorted({f"{o.colour} {o.shape}" for o in Scene.from_json(scene_json).objects})


def pope_questions(objects: Mapping[str, Sequence[str]], per_image: int = 3, seed: int = 0) -> list[PopeQuestion]:
    """Balanced questions for each strategy: of each image up to `per_image` present objects and as many absent ones.

    Args:
        objects: image -> what is in it (different names). Images without an object are left out.
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
    """strategy -> accuracy (with interval), precision, recall, F1 of "yes", share of "yes", number of questions."""
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


def ask_pope(model, processor, features, questions: Sequence[PopeQuestion], rows: Sequence[int], batch_size: int = 32):
    """For each question whether "yes" is likelier than "no"; `rows` says which of `features` is its image."""
    from blipren.training.evaluation.image_use import answer_losses

    own = features[list(rows)]
    texts = [q.text for q in questions]
    yes = answer_losses(model, processor, own, texts, ["yes"] * len(texts), batch_size)
    no = answer_losses(model, processor, own, texts, ["no"] * len(texts), batch_size)
    return [a[0] < b[0] for a, b in zip(yes, no)]
