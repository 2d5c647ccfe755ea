"""Questions and answers about boxes and points, written by fixed templates.

| kind | prompt | answer |
| --- | --- | --- |
| find | Find every red car. | `[x1, y1, x2, y2]` of each, from left to right, or: not in the picture |
| refer | Find the man on the left. | `[x1, y1, x2, y2]` |
| name | What is in [x1, y1, x2, y2]? | red car |
| count | Count every red car. | 2 |
| point | Point at every red car. | `[x, y]` of each, from left to right, or: not in the picture |
| caption | Caption with boxes: | a man `[x1, y1, x2, y2]` on a horse `[x1, y1, x2, y2]` |

Find, count and point speak of categories, of which the data names all objects; refer speaks of expressions, each of which
means one object. A category is asked for in vain only where the data itself says that it is absent.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from blipren.grounding_blipren import NOT_FOUND, write_place

FIND, REFER, NAME = "Find every {}.", "Find the {}.", "What is in {}?"
COUNT, POINT, CAPTION = "Count every {}.", "Point at every {}.", "Caption with boxes:"
KINDS = ("find", "refer", "name", "count", "point", "caption")


@dataclass(frozen=True)
class GroundedObject:
    """One thing in an image, in pixels of the upright image."""

    category: str | None = None
    box: tuple[float, float, float, float] | None = None
    """x1, y1, x2, y2."""
    point: tuple[float, float] | None = None
    expressions: tuple[str, ...] = ()
    """Texts that mean this object alone."""

    def place(self) -> tuple[float, float]:
        """Return the point that stands for the object: its own, or the middle of its box."""
        if self.point:
            return self.point
        x1, y1, x2, y2 = self.box
        return ((x1 + x2) / 2, (y1 + y2) / 2)


@dataclass(frozen=True)
class GroundedCaption:
    """A caption and the boxes of its phrases, in the order of the caption: `(end of the phrase, boxes)`."""

    text: str
    phrases: tuple[tuple[int, tuple[tuple[float, float, float, float], ...]], ...]


@dataclass
class GroundTruth:
    """All that a row says about places in its image."""

    objects: list[GroundedObject] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    """Categories that are not in the picture."""
    captions: list[GroundedCaption] = field(default_factory=list)
    uncounted: set[str] = field(default_factory=set)
    """Categories of which not all objects are known; they are neither found, counted nor pointed at."""

    def categories(self) -> dict[str, list[GroundedObject]]:
        """Return the objects of each category from left to right, and no object of those that are absent."""
        found: dict[str, list[GroundedObject]] = {}
        for thing in sorted(self.objects, key=lambda o: o.box or (*o.place(), 0, 0)):
            if thing.category and thing.category not in self.uncounted:
                found.setdefault(thing.category, []).append(thing)
        return found | {name: [] for name in self.absent}

    def texts(self) -> list[str]:
        """Return the words of the data set: categories, expressions and captions."""
        names = [thing.category for thing in self.objects if thing.category] + self.absent
        words = [text for thing in self.objects for text in thing.expressions]
        return [*names, *words, *(caption.text for caption in self.captions)]


def truth_of_view(
    truth: GroundTruth, corners: Sequence[float], mirrored: bool = False
) -> tuple[GroundTruth, list[tuple[str, str]]]:
    """Return what is true of a part of the image, mirrored or not, in pixels of that part.

    An object whose box crosses the edge is left out, and its category is not asked for, since it is neither wholly there
    nor absent. A category whose objects are all outside is absent. A caption with boxes stays if all of them are inside.

    Args:
        corners: x1, y1, x2, y2 of the part, in pixels of the image.

    Returns:
        The truth, and what was left out: `(reason, value)`.
    """
    left, top, right, bottom = corners
    moved = GroundTruth(uncounted=set(truth.uncounted))
    left_out: list[tuple[str, str]] = []

    def move(place: Sequence[float]) -> tuple[float, ...] | None:
        """Return a box or a point in pixels of the part, or None if it is not wholly inside."""
        across, down = place[::2], place[1::2]
        if min(across) < left or max(across) > right or min(down) < top or max(down) > bottom:
            return None
        across = [right - x for x in reversed(across)] if mirrored else [x - left for x in across]
        return tuple(number for pair in zip(across, (y - top for y in down)) for number in pair)

    gone = []
    for thing in truth.objects:
        extent = thing.box or (*thing.point, *thing.point)
        box, point = (None if place is None else move(place) for place in (thing.box, thing.point))
        if (thing.box is None) == (box is None) and (thing.point is None) == (point is None):
            moved.objects.append(replace(thing, box=box, point=point))
        elif extent[0] >= right or extent[1] >= bottom or extent[2] <= left or extent[3] <= top:
            gone.append(thing.category)
        else:
            left_out.append(("cut_by_view", f"{thing.category or thing.expressions[0]} {list(extent)}"))
            moved.uncounted |= {thing.category} - {None}
    there = {thing.category for thing in moved.objects} | moved.uncounted | {None}
    moved.absent = [name for name in dict.fromkeys([*truth.absent, *gone]) if name not in there]
    for caption in truth.captions:
        phrases = tuple((end, tuple(move(box) for box in boxes)) for end, boxes in caption.phrases)
        if any(box is None for _, boxes in phrases for box in boxes):
            left_out.append(("cut_by_view", caption.text))
        else:
            moved.captions.append(GroundedCaption(caption.text, phrases))
    return moved, left_out


def write_questions(truth: GroundTruth, size: Sequence[int], kinds: Collection[str]) -> list[tuple[str, str]]:
    """Return questions with their answers about an image of `size` (width, height): all that the templates give.

    Args:
        kinds: names of templates, of `KINDS`.
    """
    pairs = []
    for name, things in truth.categories().items():
        boxes = [write_place(thing.box, size) for thing in things if thing.box]
        if "find" in kinds and len(boxes) == len(things):
            pairs.append((FIND.format(name), ", ".join(boxes) or NOT_FOUND))
        if "count" in kinds:
            pairs.append((COUNT.format(name), str(len(things))))
        if "point" in kinds:
            points = [write_place(thing.place(), size) for thing in things]
            pairs.append((POINT.format(name), ", ".join(points) or NOT_FOUND))
    for thing in truth.objects:
        if "refer" in kinds and thing.box:
            box = write_place(thing.box, size)
            pairs += [(REFER.format(words.removeprefix("the ")), box) for words in thing.expressions]
        if "name" in kinds and thing.box and thing.category:
            pairs.append((NAME.format(write_place(thing.box, size)), thing.category))
    if "caption" in kinds:
        pairs += [(CAPTION, write_grounded_caption(caption, size)) for caption in truth.captions]
    return pairs


def write_grounded_caption(caption: GroundedCaption, size: Sequence[int]) -> str:
    """Return the caption with the boxes of each phrase behind it."""
    parts, start = [], 0
    for end, boxes in caption.phrases:
        parts += [caption.text[start:end], " ", ", ".join(write_place(box, size) for box in boxes)]
        start = end
    return "".join([*parts, caption.text[start:]])
