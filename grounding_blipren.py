"""Boxes and points as text: `[x1, y1, x2, y2]` and `[x, y]` in thousandths of the upright image's width and height.

Any language model can write them, since the numbers are plain digits. The integer n stands for the shares from n/1000 to
(n+1)/1000 of a side and is read as their middle, so that writing and reading a place moves it by half a thousandth at most.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

UNITS = 1000
NOT_FOUND = "not in the picture"
_GROUP = re.compile(r"\[([^\[\]]*)(\]?)")
_NUMBERS = re.compile(r"\s*(?:0|[1-9][0-9]{0,2})\s*(?:,\s*(?:0|[1-9][0-9]{0,2})\s*)*")


@dataclass
class Grounding:
    """What a text says about places, in thousandths. `labels` and `point_labels` are the words in front of each."""

    boxes: list[tuple[int, int, int, int]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    points: list[tuple[int, int]] = field(default_factory=list)
    point_labels: list[str] = field(default_factory=list)
    malformed: int = 0
    """Groups in square brackets that hold digits and are neither a box nor a point."""


def write_place(place: Sequence[float], size: Sequence[float]) -> str:
    """Return a box or a point in pixels as text.

    Args:
        place: x1, y1, x2, y2 or x, y in pixels of the upright image.
        size: width and height of that image.

    Raises:
        ValueError: the place is not within the image.
    """
    numbers = []
    for number, value in enumerate(place):
        share = value / size[number % 2]
        if not 0 <= share <= 1:
            raise ValueError(f"{list(place)} is not within an image of {size[0]} x {size[1]} pixels")
        numbers.append(min(UNITS - 1, int(share * UNITS)))
    return f"[{', '.join(map(str, numbers))}]"


def read_places(text: str) -> Grounding:
    """Read all boxes and points of a text. Spaces and line breaks within them do not matter.

    A group in square brackets without a digit is no place. One with a digit that is not two or four integers from 0 to
    999, without leading zeros, or whose corners are not in order, is counted as malformed; so is one that is not closed.
    """
    found = Grounding()
    end = 0
    words = ""
    for group in _GROUP.finditer(text):
        between = text[end : group.start()].strip(" \t\n,;:.]")
        end = group.end()
        words = re.sub(r"^and\s+", "", between) if between and between != "and" else words
        if not re.search(r"[0-9]", group[1]):
            continue
        numbers = [int(n) for n in group[1].split(",")] if group[2] and _NUMBERS.fullmatch(group[1]) else []
        if len(numbers) == 2:
            found.points.append((numbers[0], numbers[1]))
            found.point_labels.append(words)
        elif len(numbers) == 4 and numbers[0] < numbers[2] and numbers[1] < numbers[3]:
            found.boxes.append((numbers[0], numbers[1], numbers[2], numbers[3]))
            found.labels.append(words)
        else:
            found.malformed += 1
    return found


def to_pixels(place: Sequence[int], size: Sequence[float]) -> list[float]:
    """Return a box or a point in thousandths as pixels of an image of `size` (width, height)."""
    return [(n + 0.5) / UNITS * size[number % 2] for number, n in enumerate(place)]


__all__ = ["NOT_FOUND", "UNITS", "Grounding", "read_places", "to_pixels", "write_place"]
