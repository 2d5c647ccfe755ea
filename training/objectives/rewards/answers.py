"""Rewards of answers to questions."""

import re
from collections.abc import Sequence

from blipren.training.evaluation.metrics.vqa import normalize_answer, soft_score

# "(B) a cat", "B. a cat", "B"
_OPTION = re.compile(r"\(?([A-Z])\)?(?:[.:)]\s*|\s+|$)")


def vqa(
    completions: Sequence[str], references: Sequence[Sequence[str]], prompts: Sequence[str | None], **columns
) -> list[float | None]:
    """Return the VQA accuracy of each answer, in the metric's normal form; it does not apply to captions."""
    return [
        None if prompt is None else soft_score(completion, own)
        for completion, own, prompt in zip(completions, references, prompts)
    ]


def chosen_option(answer: str) -> str | None:
    """Return the letter that an answer begins with, as options have it: "(B) a cat" -> "B"."""
    found = _OPTION.match(answer.strip())
    return found[1] if found else None


def choice(
    completions: Sequence[str], references: Sequence[Sequence[str]], prompts: Sequence[str | None], **columns
) -> list[float | None]:
    """Return 1 for an answer that names the right option, by its letter or its text, else 0; none for captions."""
    found: list[float | None] = []
    for completion, own, prompt in zip(completions, references, prompts):
        if prompt is None:
            found.append(None)
            continue
        said, letter = normalize_answer(completion), chosen_option(completion)
        found.append(float(any(said == normalize_answer(r) or (letter and letter == chosen_option(r)) for r in own)))
    return found
