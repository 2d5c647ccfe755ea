"""What happens to a row before the encoder: texts filtered, image decoded, views cut, pixels made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from blipren.training.data.cache.encoder import FRAME_TIMES, PIXEL_INPUTS
from blipren.training.data.cache.views import can_be_mirrored, cut_view, draw_view
from blipren.training.data.sources.boxes import read_ground_truth
from blipren.training.data.sources.caption_filter import CaptionFilter, FilteredTexts, filter_texts
from blipren.training.data.sources.grounding import GroundTruth, truth_of_view, write_questions
from blipren.training.data.sources.images import ImageError
from blipren.training.data.sources.near_duplicates import image_signature
from blipren.training.data.sources.rows import Row
from blipren.training.data.sources.splits import split_by_hash


@dataclass(kw_only=True)
class PrepareConfig:
    """Settings of the preparation."""

    image_processor: Any
    rules: CaptionFilter = field(default_factory=CaptionFilter)
    caption_counts: Counter[str] | None = None
    validation_share: float = 0.05
    test_share: float = 0.05
    views: int = 1
    view_scale: float = 0.6
    view_flip: bool = True
    variable: bool = False
    num_frames: int | None = None
    """Frames of a video; None where the data set holds images."""
    grounding: tuple[str, ...] = ()
    """Questions to make of boxes and points, of `grounding.KINDS`."""
    bbox_format: str = "xywh"
    category_names: Sequence[str] | None = None
    """Names of categories that the data set writes as numbers."""
    encode: bool = True
    """False in a dry run, which makes no pixels."""


@dataclass
class Prepared:
    """A row to be cached, without its features."""

    row: Row
    split: str
    image_hash: str
    phash: int
    thumb: np.ndarray
    prompts: list[str | None]
    answers: list[str]
    kept: list[int]
    """Places of these texts among the row's own."""
    places: list[list[tuple[str, str]]] = field(default_factory=list)
    """Questions and answers about boxes and points that are true of each view; those of the first are among the texts."""
    scores: list[float | None] | None = None
    """Similarity of each of the row's own texts to the image, where the settings ask for it."""


@dataclass
class PreparedBatch:
    """Rows with the pixels of their views (those of one row behind each other), and what was rejected."""

    rows: list[Prepared]
    pixels: dict[str, Any]
    rejected: list[dict[str, Any]]
    num_rows: int
    """Number of rows that were read, rejected ones included."""
    num_texts: int
    """Number of texts that were read, rejected ones included."""


def rejection(row: Row, kind: str, reason: str, value: str, text: str | None = None) -> dict[str, Any]:
    """Return a line of `rejected.jsonl`. `kind` is `row` or `text`."""
    line = {"kind": kind, "id": row.id, "row": row.index, "reason": reason, "value": value[:500]}
    return line if text is None else line | {"text": text[:200]}


def contact_sheet(frames: list[Image.Image]) -> Image.Image:
    """Return the frames of a video side by side: clips of the same things in another order are no near duplicates."""
    side = 64
    sheet = Image.new("RGB", (side * len(frames), side))
    for number, frame in enumerate(frames):
        sheet.paste(frame.resize((side, side), Image.Resampling.BOX), (side * number, 0))
    return sheet


def prepare_row(row: Row, config: PrepareConfig) -> tuple[Prepared | None, list[Image.Image], list[dict[str, Any]]]:
    """Prepare one row. Returns it (None if it is rejected), the images of its views, and lines of `rejected.jsonl`."""
    rejected = [rejection(row, "text", rule, value) for rule, value in row.problems]
    if row.rejected:
        return None, [], [*rejected, rejection(row, "row", *row.rejected)]
    left = filter_texts(row.prompts, row.answers, config.rules, config.caption_counts)
    rejected += [rejection(row, "text", rule, value, text) for rule, value, text in left.rejected]
    if not left.answers and not row.shown and not config.grounding:
        if row.conversation and not row.answers:
            why = ("conversation_only", "a conversation is trained on from a feature cache, made by `blipren embed`")
        else:
            why = ("no_caption", rejected[0]["reason"] if rejected else "no text in its columns")
        return None, [], [*rejected, rejection(row, "row", *why)]
    try:
        image_hash = row.image_hash()
        frames = [row.load()] if config.num_frames is None else row.load_frames(config.num_frames)
    except ImageError as error:
        return None, [], [*rejected, rejection(row, "row", error.reason, error.detail)]
    truth, own_texts = GroundTruth(), [*left.answers, *left.prompts]
    if config.grounding:
        truth, broken = _read_truth(row, config)
        rejected += [rejection(row, "text", *problem) for problem in broken]
        _add_texts(row, left, write_questions(truth, (row.width, row.height), config.grounding))
        if not left.answers and not row.shown:
            return None, [], [*rejected, rejection(row, "row", "no_caption", "no text, box or point in its columns")]
    split = row.split or split_by_hash(image_hash, config.validation_share, config.test_share)
    phash, thumb = image_signature(frames[0] if config.num_frames is None else contact_sheet(frames))
    prepared = Prepared(row, split, image_hash, phash, thumb, left.prompts, left.answers, left.kept)
    flip = config.view_flip and row.can_be_mirrored and can_be_mirrored([*own_texts, *truth.texts()])
    views = []
    for number in range(config.views):
        view = draw_view(frames[0].size, number, image_hash, flip, config.view_scale)
        seen, cut = truth_of_view(truth, *view)
        x1, y1, x2, y2 = view.corners
        pairs = write_questions(seen, (x2 - x1, y2 - y1), config.grounding)
        if number and prepared.places[0] and not (pairs or own_texts):  # nothing can be said about this part
            view, pairs = draw_view(frames[0].size, 0, image_hash, flip, config.view_scale), prepared.places[0]
        cut = [(reason, f"view {number}: {value}") for reason, value in cut]
        row.problems += cut
        rejected += [rejection(row, "text", *problem) for problem in cut]
        prepared.places.append(pairs)
        views += [cut_view(frame, view, config.variable) for frame in frames]
    return prepared, views, rejected


def _read_truth(row: Row, config: PrepareConfig) -> tuple[GroundTruth, list[tuple[str, str]]]:
    """Return what the row says about boxes and points, and what of it was broken: `(reason, value)`."""
    records = [record for record in (row.record, *row.merged_records) if record]
    truth, broken = read_ground_truth(records, (row.width, row.height), config.bbox_format, config.category_names)
    row.problems += broken
    return truth, broken


def _add_texts(row: Row, left: FilteredTexts, pairs: list[tuple[str, str]]) -> None:
    """Add questions with their answers to the texts of a row."""
    left.kept += range(len(row.answers), len(row.answers) + len(pairs))
    for prompt, answer in pairs:
        for texts in (row, left):
            texts.prompts.append(prompt)
            texts.answers.append(answer)


def _pixels(images: list[Image.Image], config: PrepareConfig) -> dict[str, torch.Tensor]:
    inputs = config.image_processor(images=images, return_tensors="pt")
    return {name: inputs[name] for name in PIXEL_INPUTS if name in inputs}


def prepare_batch(rows: list[Row], config: PrepareConfig) -> PreparedBatch:
    """Prepare rows. A faulty row is rejected; it raises nothing."""
    kept, images, rejected = [], [], []
    texts = 0
    for row in rows:
        prepared, views, lines = prepare_row(row, config)
        texts += len(row.answers) + len(row.problems)
        rejected += lines
        if prepared is not None:
            kept.append(prepared)
            images.append(views)
    pixels: dict[str, Any] = {}
    if kept and config.encode:
        try:
            pixels = _pixels([view for views in images for view in views], config)
        except (ValueError, TypeError, ZeroDivisionError, MemoryError, OverflowError):
            # one image that the image processor cannot take fails the whole batch: find it
            good = []
            for place, (prepared, views) in enumerate(zip(kept, images)):
                try:
                    _pixels(views, config)
                    good.append(place)
                except (ValueError, TypeError, ZeroDivisionError, MemoryError, OverflowError) as error:
                    size = f"{prepared.row.width}x{prepared.row.height}"
                    rejected.append(rejection(prepared.row, "row", "image_processor", f"{size}: {error}"))
            kept, images = [kept[i] for i in good], [images[i] for i in good]
            if kept:
                pixels = _pixels([view for views in images for view in views], config)
    if pixels and config.num_frames is not None:
        seconds = [prepared.row.seconds / config.num_frames for prepared in kept for _ in range(config.views)]
        pixels[FRAME_TIMES] = torch.tensor(seconds)
    for prepared in kept:  # the undecoded image is not sent back to the main process
        prepared.row.image = prepared.row._data = prepared.row.record = None
        prepared.row.merged_records = []
    return PreparedBatch(kept, pixels, rejected, len(rows), texts)


def pixel_bytes(config: PrepareConfig, batch_size: int) -> int:
    """Return the size of a batch's pixels in bytes, measured on a blank image."""
    pixels = _pixels([Image.new("RGB", (320, 240))], config)
    return sum(tensor.nbytes + 64 for tensor in pixels.values()) * batch_size
