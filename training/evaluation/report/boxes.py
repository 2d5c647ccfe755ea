"""Answers about boxes as the report and the model card show them."""

from __future__ import annotations

import contextlib

from PIL import Image

from blipren.grounding_blipren import read_places
from blipren.training.data.sources.images import ImageError
from blipren.training.evaluation.refer import place_rows
from blipren.training.evaluation.report.pictures import image_url
from blipren.training.evaluation.report.places import draw_places
from blipren.training.evaluation.results import Evaluation


def place_items(result: Evaluation, count: int) -> list[dict]:
    """Return pictures of answers to questions with one true box, which is dashed, sorted by IoU: best, worst, and between."""
    rows = [(row, a) for row, a in zip(place_rows(result.places), result.places) if "iou" in row]
    rows.sort(key=lambda pair: -pair[0]["iou"])
    chosen = [rows[k * len(rows) // count] for k in range(count)] if len(rows) > count else rows
    examples = {example.id: example for example in result.examples}
    return [
        {
            "image": image_url(draw_places(examples[a.image].load(), a.text, a.question, a.boxes)),
            "id": a.image,
            "question": a.question,
            "answer": a.text,
            "iou": row["iou"],
        }
        for row, a in chosen
    ]


def draw_samples(result: Evaluation, count: int = 12) -> tuple[list[Image.Image], list[str]]:
    """Return a few images with captions, or with answers that hold boxes or points, spread evenly over the split.

    Where there are both, they are half of the pictures each. Images that cannot be read are left out.
    """
    examples = {example.id: example for example in result.examples}
    found = [(a, read_places(a.text)) for a in result.places]
    placed = {a.image: (a.image, a.question, a.text) for a, places in found if places.boxes or places.points}
    captioned = [(name, None, result.captions[name]["text"]) for name in examples if name in result.captions]
    kinds = [answers for answers in (captioned, list(placed.values())) if answers]
    images, captions = [], []
    for answers in kinds:
        number = min(count // len(kinds), len(answers))
        for name, question, text in (answers[k * len(answers) // number] for k in range(number)):
            with contextlib.suppress(ImageError):  # the images of given captions may be missing
                images.append(draw_places(examples[name].load(), text, question))
                captions.append(text if question is None else f"{question} {text}")
    return images, captions
