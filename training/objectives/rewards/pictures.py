"""Rewards by what is in the picture."""

from collections.abc import Mapping, Sequence
from typing import Any

from blipren.training.evaluation.judges import find_judge
from blipren.training.evaluation.metrics.hallucination import coco_objects


def scene(
    completions: Sequence[str], prompts: Sequence[str | None], facts: Sequence[Mapping[str, Any]], **columns
) -> list[float | None]:
    """Return 1 for a caption that is true, else 0, by the judge of the images (`blipren.judges`).

    It does not apply to answers to questions, and to images without the judge's column.
    """
    column, judge = find_judge(facts) or (None, None)
    return [
        float(judge.judge_caption(completion, own[column]).true) if prompt is None and column in own else None
        for completion, prompt, own in zip(completions, prompts, facts)
    ]


def hallucination(
    completions: Sequence[str],
    prompts: Sequence[str | None],
    references: Sequence[Sequence[str]],
    facts: Sequence[Mapping[str, Any]],
    **columns,
) -> list[float | None]:
    """Return the share of a caption's objects that are in the image, 1 where it names none.

    What is there is known by a judge, else by the annotated objects and the references, as CHAIR takes them. It does
    not apply to answers to questions. Beside it stands a reward for what a caption says: an empty one invents nothing.
    """
    column, judge = find_judge(facts) or (None, None)
    found: list[float | None] = []
    for completion, prompt, own_references, own in zip(completions, prompts, references, facts):
        if prompt is not None:
            found.append(None)
            continue
        if column in own:
            verdict = judge.judge_caption(completion, own[column])
            invented, named = verdict.hallucinated, verdict.mentioned
        else:
            there = {category for text in own_references for category in coco_objects(text)}
            there |= {o["category"] for o in own.get("objects", ())}
            objects = coco_objects(completion)
            invented, named = sum(o not in there for o in objects), len(objects)
        found.append(1 - invented / named if named else 1.0)
    return found
