"""Judges: they check captions of pictures whose content is known exactly.

A package brings a judge by an entry point of the group `blipren.judges`. The entry point's name is the column of
`metadata.jsonl` that holds the content of a picture, its value the judge's class. The quickstart brings the judge of its
drawn scenes, for the column `scene`. A judge is found by the columns of the rows; data cannot name code.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol

GROUP = "blipren.judges"


@dataclass(frozen=True)
class CaptionVerdict:
    """The verdict on one caption.

    Attributes:
        true: the caption names everything that it has to name, and everything that it states holds.
        attribute_recall: share of the picture's attributes that the caption names correctly.
        hallucinated: number of named objects that the picture does not have.
        mentioned: number of named objects.
        problems: the reasons why the caption is not true.
    """

    true: bool
    attribute_recall: float
    hallucinated: int
    mentioned: int
    problems: tuple[str, ...]


class Judge(Protocol):
    """What an entry point of the group `blipren.judges` names: a class whose instances have this interface."""

    basis: str
    """What the verdicts rest on, for the report."""

    def judge_caption(self, caption: str, content: Any) -> CaptionVerdict:
        """Check a caption against the content of the picture: the value of the judge's column."""

    def list_objects(self, content: Any) -> list[str]:
        """Return the names of the objects in the picture, for yes/no questions about objects."""


@functools.cache
def installed_judges() -> dict[str, Judge]:
    """Return the judges of all installed packages by the column that they read."""
    return {entry.name: entry.load()() for entry in sorted(metadata.entry_points(group=GROUP), key=lambda e: e.name)}


def find_judge(facts: Iterable[Mapping[str, Any]]) -> tuple[str, Judge] | None:
    """Return the column and the judge that fit some rows: the first judge whose column is in one of the rows."""
    columns = {column for row in facts for column in row}
    return next(((column, judge) for column, judge in installed_judges().items() if column in columns), None)
