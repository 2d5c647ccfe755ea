"""The task `refer`: questions about boxes and points, made of the annotations of the split as `embed --grounding` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from blipren.grounding_blipren import read_places, write_place
from blipren.training.data.sources.boxes import read_ground_truth
from blipren.training.data.sources.grounding import POINT, write_questions
from blipren.training.evaluation.examples import Example
from blipren.training.evaluation.metrics.boxes import PlaceAnswer, first_iou, place_scores, points_inside

if TYPE_CHECKING:
    from blipren.training.evaluation.results import Evaluation

ANSWER_TOKENS = 256  # at least, since every digit may be a token
GROUP_COLUMN = "group"
"""Column that divides the images into groups with scores of their own."""


def place_questions(
    example: Example, image: Image.Image, kinds: Sequence[str], bbox_format: str, names: Sequence[str] | None = None
) -> list[dict]:
    """Return the questions about an image: `kind`, `question`, `truth` and the true `boxes` in thousandths.

    Args:
        kinds: of `grounding.KINDS`. bbox_format: of `boxes.FORMATS`. names: of the categories, where they are numbers.
    """
    records = [record for record in (example.row.record, *example.row.merged_records) if record]
    truth, _ = read_ground_truth(records, image.size, bbox_format, names)
    boxes = {}
    for name, things in truth.categories().items():
        if all(thing.box for thing in things):
            boxes[POINT.format(name)] = [write_place(thing.box, image.size) for thing in things]
    found = []
    for kind in kinds:
        for question, answer in write_questions(truth, image.size, [kind]):
            text = " ".join(boxes.get(question, [])) if kind == "point" else answer if kind != "name" else ""
            found.append({"kind": kind, "question": question, "truth": answer, "boxes": read_places(text).boxes})
    return found


def add_places(result: Evaluation, settings) -> None:
    """Add the scores of the task, and those of each group of images if the data set has groups."""
    answers, groups = [], {}
    for example in result.examples:
        groups[example.id] = example.row.record.get(GROUP_COLUMN)
        for place in result.records[example.id].get("places", []):
            boxes = tuple(tuple(box) for box in place["boxes"])
            answers.append(
                PlaceAnswer(example.id, place["kind"], place["question"], place["truth"], boxes, place["text"])
            )
    result.places = answers
    scores = place_scores(answers, settings.resamples, settings.seed)
    scores["images"] = len({a.image for a in answers})
    names = sorted(set(groups.values()) - {None})
    for name in names if len(names) > 1 else ():
        own = [a for a in answers if groups[a.image] == name]
        scores[name] = place_scores(own, settings.resamples, settings.seed)
    result.metrics["refer"] = scores


def place_rows(answers: Sequence[PlaceAnswer]) -> list[dict]:
    """Return the rows of predictions.jsonl. `iou` is that of the first box where there is one true box."""
    rows = []
    for a in answers:
        row = {"id": a.image, "prompt": a.question, "caption": a.text, "references": [a.truth], "refer": a.kind}
        if a.kind in ("find", "refer") and len(a.boxes) == 1:
            row["iou"] = round(first_iou(a.text, a.boxes[0]), 4)
        elif a.kind == "point" and a.boxes:
            row["inside"] = round(points_inside(a.text, a.boxes), 4)
        rows.append(row)
    return rows


def place_lines(scores: dict) -> list[str]:
    """Return the most important scores as lines for the screen."""
    lines = []
    for title, part in [("refer", scores)] + [(f"  {n}", scores[n]) for n in ("seen", "unseen") if n in scores]:
        shown = {n: v for n, v in part.items() if isinstance(v, float)}
        lines.append(f"{title}: " + ", ".join(f"{n} {v:.3f}" for n, v in shown.items()))
        for fixed in ("centre_box", "most_frequent_box"):
            if fixed in part:
                lines.append(
                    f"  {fixed.replace('_', ' ')}: " + ", ".join(f"{n} {v:.3f}" for n, v in part[fixed].items())
                )
    return lines
