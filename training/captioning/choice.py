"""Which captions stay: the best candidates, the filter, and the columns that they become."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from blipren.training.captioning.decoder import Answer
from blipren.training.captioning.filter_rules import FILTER_RULES
from blipren.training.errors import UserError

_NAMED = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class CaptionColumn:
    """The column of a prompt.

    Attributes:
        name: of the column; those of the figures begin with it. prompt: None is the model's own caption prompt.
    """

    name: str
    prompt: str | None

    def names(self) -> dict[str, str]:
        """Return figure -> name of its column."""
        figures = ("num_tokens", "mean_logprob", "matching_score", "ended")
        return {"text": self.name} | {figure: f"{self.name}_{figure}" for figure in figures}


def caption_columns(prompts: Sequence[str | None], taken: Sequence[str]) -> list[CaptionColumn]:
    """Return the columns of prompts: `caption` for one, the name in NAME=PROMPT, or `caption_0`, `caption_1`, ...

    A name that the data set has already gets `generated_` in front.

    Raises:
        UserError: two prompts have the same name.
    """
    columns = []
    for number, prompt in enumerate(prompts):
        name = "caption" if len(prompts) == 1 else f"caption_{number}"
        if prompt is not None and (named := _NAMED.fullmatch(prompt)):
            name, prompt = named.groups()
        column = CaptionColumn(name, prompt)
        if set(column.names().values()) & set(taken):
            column = CaptionColumn(f"generated_{name}", prompt)
        columns.append(column)
    names = [column.name for column in columns]
    if len(set(names)) < len(names):
        raise UserError(f"two prompts would have the same column: the columns are {', '.join(names)}")
    return columns


def column_features(columns: Sequence[CaptionColumn], keep: int, scored: bool) -> datasets.Features:
    """Return the types of the columns; lists where several candidates are kept."""
    kinds = {"text": "string", "num_tokens": "int32", "mean_logprob": "float32", "ended": "bool"}
    kinds |= {"matching_score": "float32"} if scored else {}
    found = {}
    for column in columns:
        for figure, name in column.names().items():
            if figure in kinds:
                value = datasets.Value(kinds[figure])
                found[name] = value if keep == 1 else datasets.List(value)
    return datasets.Features(found)


def refusal(answer: Answer, rules: dict[str, Any]) -> tuple[str, str] | None:
    """Return `(rule, value)` of the first rule that refuses a caption, or None."""
    for rule, limit in rules.items():
        value = FILTER_RULES[rule](answer)
        low = rule.startswith("min_") and value < limit
        if low or (rule.startswith("max_") and value > limit) or (rule == "ended" and limit and not value):
            return rule, f"{value} ({answer.text})"
    return None


def choose(
    candidates: Sequence[Answer], keep: int, rules: dict[str, Any]
) -> tuple[list[Answer], tuple[str, str] | None]:
    """Return the candidates that stay, best matching score first, and why the best of the refused was refused."""
    ordered = sorted(
        candidates, key=lambda answer: -(answer.matching_score or 0.0)
    )  # stable: equal scores stay in order
    refused = [refusal(answer, rules) for answer in ordered]
    left = [answer for answer, why in zip(ordered, refused) if why is None]
    return left[:keep], next((why for why in refused if why is not None), None)


def caption_record(column: CaptionColumn, answers: Sequence[Answer], keep: int) -> dict[str, Any]:
    """Return the values of the columns of a prompt."""
    values = {}
    for figure, name in column.names().items():
        own = [getattr(answer, figure) for answer in answers]
        values[name] = own[0] if keep == 1 else own
    return values
