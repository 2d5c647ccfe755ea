"""Reward of answers that hold boxes."""

from collections.abc import Sequence

from blipren.grounding_blipren import NOT_FOUND, read_places
from blipren.training.evaluation.metrics.boxes import box_reward


def box(
    completions: Sequence[str], references: Sequence[Sequence[str]], prompts: Sequence[str | None], **columns
) -> list[float | None]:
    """Return how well the boxes of each answer fit the true ones, from 0 to 1: intersections over unions, matched one to one.

    A reference without a box counts only if it is "not in the picture"; other questions, and captions, get none.
    """
    found: list[float | None] = []
    for completion, own, prompt in zip(completions, references, prompts):
        truths = [r for r in own if r == NOT_FOUND or read_places(r).boxes]
        judged = prompt is not None and truths
        found.append(max(box_reward(completion, truth) for truth in truths) if judged else None)
    return found
