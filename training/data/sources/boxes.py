"""Boxes and points of a row, as data sets write them, in pixels of the upright image.

Columns that are read:

- `objects`: a list of objects, or one object of lists, with `bbox`, `point` or both, and `category`, `expressions` (texts
  that mean this object alone) or both. An object with `iscrowd` stands for an unknown number of its category.
- `bbox` of the row itself with `expressions`, `sentences`, `expression` or `category` (RefCOCO: a row an object).
- `absent`: names of categories that are not in the picture.
- `grounded_captions`: a list of `{"caption", "phrases": [{"phrase", "bbox"}]}`; `bbox` may be a list of boxes.
- `bbox_format`: the form of the row's boxes and points, where it is not the data set's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from blipren.grounding_blipren import read_places, write_place
from blipren.training.data.sources.columns import texts
from blipren.training.data.sources.grounding import GroundedCaption, GroundedObject, GroundTruth

FORMATS = ("xywh", "xyxy", "cxcywh", "xywhn", "xyxyn", "cxcywhn")
"""COCO's left, top, width, height; two corners; centre, width, height. With n in shares of the sides, else in pixels."""
EDGE = 1.0  # pixels by which a box may reach over the edge, since data sets round
_LIST_KEYS = ("category", "bbox", "point", "expressions", "iscrowd")
_OF_A_ROW = ("bbox", "expressions", "sentences", "expression", "category")


class BrokenPlace(Exception):
    """A box or point that cannot be used: `(reason, value)`."""


def place_columns(record: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of a record that hold boxes and points, or nothing if it has none."""
    columns = ("objects", "absent", "grounded_captions", *(_OF_A_ROW if record.get("bbox") is not None else ()))
    found = {name: record[name] for name in columns if record.get(name) is not None}
    return found | {"bbox_format": record.get("bbox_format")} if found else {}


def read_ground_truth(
    records: Sequence[dict[str, Any]], size: tuple[int, int], bbox_format: str, names: Sequence[str] | None = None
) -> tuple[GroundTruth, list[tuple[str, str]]]:
    """Read all boxes and points that the records of an image hold. Records that hold the same are read once.

    A category with a broken box or a crowd is in `GroundTruth.uncounted`, since not all of its objects are known.

    Args:
        records: columns of each row about the image.
        size: width and height of the upright image.
        bbox_format: of `FORMATS`.
        names: of the categories, where the data set numbers them.

    Returns:
        The truth, and what was broken: `(reason, value)`.
    """
    truth, problems = GroundTruth(), []
    places = [own for record in records if (own := place_columns(record))]
    for record in (own for number, own in enumerate(places) if own not in places[:number]):
        form = record.get("bbox_format") or bbox_format
        if form not in FORMATS:
            problems.append(("bbox_format", f"{form!r} is none of {', '.join(FORMATS)}"))
            continue
        for entry in _objects(record):
            category = entry.get("category")
            if names and isinstance(category, int) and 0 <= category < len(names):
                category = names[category]
            if category is not None and not (isinstance(category, str) and category.strip()):
                problems.append(("category_no_text", repr(category)[:200]))
                category = None
            try:
                box = _read_box(entry["bbox"], form, size) if entry.get("bbox") is not None else None
                point = _read_point(entry["point"], form, size) if entry.get("point") is not None else None
            except BrokenPlace as broken:
                problems.append(broken.args)
                truth.uncounted |= {category} - {None}
                continue
            words = tuple(t.strip() for t in texts(entry.get("expressions")) if isinstance(t, str) and t.strip())
            if entry.get("iscrowd"):
                truth.uncounted |= {category} - {None}
            elif (box or point) and (category or words):
                truth.objects.append(GroundedObject(category, box, point, words))
        truth.absent += [name for name in texts(record.get("absent")) if isinstance(name, str) and name.strip()]
        for entry in record.get("grounded_captions") or ():
            try:
                truth.captions.append(_read_caption(entry, form, size))
            except BrokenPlace as broken:
                problems.append(broken.args)
    there = {thing.category for thing in truth.objects} | truth.uncounted
    problems += [("absent_is_there", name) for name in truth.absent if name in there]
    truth.absent = [name for name in dict.fromkeys(truth.absent) if name not in there]
    return truth, problems


def category_names(features: Mapping[str, Any] | None) -> list[str] | None:
    """Return the names that a data set declares for the numbers in `objects.category`, if it does."""
    kind: Any = (features or {}).get("objects")
    while kind is not None and not hasattr(kind, "names"):
        kind = kind.get("category") if isinstance(kind, dict) else getattr(kind, "feature", None)
    return None if kind is None else kind.names


def _objects(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the objects of a record as one dictionary each."""
    value = record.get("objects")
    if isinstance(value, dict):
        keys = [key for key in _LIST_KEYS if isinstance(value.get(key), (list, tuple))]
        value = [dict(zip(keys, entry)) for entry in zip(*(value[key] for key in keys))]
    found = [entry for entry in value or () if isinstance(entry, dict)]
    if record.get("bbox") is not None:
        words = next((record[n] for n in ("expressions", "sentences", "expression") if record.get(n)), None)
        found.append({"bbox": record["bbox"], "category": record.get("category"), "expressions": words})
    return found


def _read_numbers(value: Any, count: int) -> list[float]:
    try:
        numbers = [float(n) for n in value]
    except (TypeError, ValueError):
        raise BrokenPlace("box_no_numbers", repr(value)[:200]) from None
    if len(numbers) != count:
        raise BrokenPlace("box_no_numbers", f"{len(numbers)} numbers where {count} are expected: {numbers[:8]}")
    if not all(map(math.isfinite, numbers)):
        raise BrokenPlace("box_nan", str(numbers))
    return numbers


def _read_box(value: Any, form: str, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return x1, y1, x2, y2 in pixels. Raises `BrokenPlace`."""
    a, b, c, d = _read_numbers(value, 4)
    if form.endswith("n"):
        a, b, c, d = a * size[0], b * size[1], c * size[0], d * size[1]
    if form.startswith("cxcywh"):
        a, b = a - c / 2, b - d / 2
    x1, y1, x2, y2 = (a, b, c, d) if form.startswith("xyxy") else (a, b, a + c, b + d)
    shown = f"{value} ({form}) in {size[0]} x {size[1]}"
    if x1 < -EDGE or y1 < -EDGE:
        raise BrokenPlace("box_negative", shown)
    if x2 < x1 or y2 < y1:
        raise BrokenPlace("box_swapped_corners", shown)
    if x2 > size[0] + EDGE or y2 > size[1] + EDGE:
        raise BrokenPlace("box_outside", shown)
    box = (max(0.0, x1), max(0.0, y1), min(float(size[0]), x2), min(float(size[1]), y2))
    if not (box[0] < box[2] and box[1] < box[3] and read_places(write_place(box, size)).boxes):
        raise BrokenPlace("box_zero_size", f"{shown}: less than a thousandth of the side")
    return box


def _read_point(value: Any, form: str, size: tuple[int, int]) -> tuple[float, float]:
    """Return x, y in pixels. Raises `BrokenPlace`."""
    x, y = _read_numbers(value, 2)
    if form.endswith("n"):
        x, y = x * size[0], y * size[1]
    if not (0 <= x <= size[0] and 0 <= y <= size[1]):
        raise BrokenPlace("point_outside", f"{value} ({form}) in {size[0]} x {size[1]}")
    return x, y


def _read_caption(entry: Any, form: str, size: tuple[int, int]) -> GroundedCaption:
    """Return a caption with its phrases' boxes. Raises `BrokenPlace`."""
    if not (isinstance(entry, dict) and isinstance(entry.get("caption"), str) and entry.get("phrases")):
        raise BrokenPlace("grounded_caption", f"no caption with phrases: {entry!r}"[:200])
    text, end, phrases = entry["caption"].strip(), 0, []
    for part in entry["phrases"]:
        start = text.find(part["phrase"], end)
        if start < 0:
            raise BrokenPlace("phrase_not_in_caption", f"{part['phrase']!r} in {text!r}"[:200])
        end = start + len(part["phrase"])
        boxes = part["bbox"] if isinstance(part["bbox"][0], (list, tuple)) else [part["bbox"]]
        phrases.append((end, tuple(_read_box(box, form, size) for box in boxes)))
    return GroundedCaption(text, tuple(phrases))
