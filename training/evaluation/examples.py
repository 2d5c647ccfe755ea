"""The split to evaluate on, one example an image: reference captions, questions with answers, known content."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from blipren.training.data.sources.boxes import category_names
from blipren.training.data.sources.images import ImageError, content_hash, image_bytes
from blipren.training.data.sources.open_rows import open_rows
from blipren.training.data.sources.rows import Row, Source
from blipren.training.data.sources.splits import SPLITS, normalize_split, split_by_hash
from blipren.training.errors import UserError
from blipren.training.evaluation.judges import installed_judges
from blipren.video_blipren import VideoFrames

logger = logging.getLogger(__name__)

FACT_COLUMNS = ("objects", "group")
"""Columns of metadata.jsonl, beside images and texts, that say what is in an image. Those of the judges are read too."""


@dataclass
class Example:
    """One image of the split.

    Attributes:
        references: its captions (texts whose prompt is the default one). questions: question -> answers of people.
        facts: other columns of the metadata: `objects` (COCO boxes), `group`, and the column of a judge.
    """

    id: str
    row: Row
    references: list[str]
    questions: dict[str, list[str]]
    facts: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Image.Image:
        """Return the image, or the middle frame of the video, as upright RGB. Raises `ImageError`."""
        try:
            return self.row.load()
        finally:
            self.row._data = None  # the encoded images of a whole split do not fit into memory

    def load_frames(self, num_frames: int) -> VideoFrames:
        """Return frames of the video, sampled evenly by time. Raises `ImageError`."""
        try:
            return self.row.load_frames(num_frames)
        finally:
            self.row._data = None


@dataclass
class Split:
    """The examples that are evaluated, and the part of the data set that they are."""

    dataset: str
    name: str
    examples: list[Example]
    rows: Counter
    """Number of rows of each split of the data set; rejected rows are counted as `rejected`."""
    fingerprint: str
    category_names: tuple[str, ...] | None = None
    """Names of the categories of objects, where the data set numbers them and its columns are kept."""

    def describe(self) -> str:
        """Return which split it is and how many images it has, in words."""
        sizes = ", ".join(f"{name} {count:,}" for name, count in self.rows.items())
        return f"split {self.name!r} of {self.dataset}: {len(self.examples):,} images (the data set has {sizes})"


def _split_of(row: Row, shares: tuple[float, float]) -> str:
    if row.rejected is not None or row.conversation_error is not None:
        return "rejected"
    if row.split is not None:
        return row.split
    try:
        if row.conversation is not None:
            return _split_of_conversation(row, shares)
        return split_by_hash(row.image_hash(), *shares)
    except ImageError:
        return "rejected"  # without a readable image there is no split
    finally:
        row._data = None


def _split_of_conversation(row: Row, shares: tuple[float, float]) -> str:
    """Return the split of a conversation: any held-out image holds it out. Raises `ImageError`."""
    keys = [content_hash(image_bytes(cell, row.folder)) for cell in row.conversation.images]
    keys = keys or [content_hash(json.dumps(row.conversation.messages, ensure_ascii=False).encode())]
    return max((split_by_hash(key, *shares) for key in keys), key=SPLITS.index)


def read_facts(dataset: str) -> dict[str, dict[str, Any]]:
    """Return what a local folder's metadata.jsonl says about each image beside its texts: id or file name -> columns."""
    found: dict[str, dict[str, Any]] = {}
    path, columns = Path(dataset), (*FACT_COLUMNS, *installed_judges())
    if not path.is_dir():
        return found
    for file in (path / "metadata.jsonl", *sorted(path.glob("*/metadata.jsonl"))):
        if not file.exists():
            continue
        for line in file.read_text(encoding="utf-8").split("\n"):
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the reader of rows rejects and counts such lines
            if not isinstance(record, dict):
                continue
            facts = {name: record[name] for name in columns if record.get(name) is not None}
            name = record.get("id", record.get("file_name"))
            if facts and name is not None:
                prefix = "" if file.parent == path or "id" in record else f"{file.parent.name}/"
                found[f"{prefix}{name}"] = facts
    return found


def _example(row: Row, facts: dict[str, dict[str, Any]], seen: Counter) -> Example:
    references, questions = [], {}
    for prompt, answer in zip(row.prompts, row.answers):
        if prompt is None:
            references.append(answer)
        else:
            questions.setdefault(prompt, []).append(answer)
    seen[row.id] += 1
    unique = row.id if seen[row.id] == 1 else f"{row.id}#{seen[row.id]}"
    return Example(unique, row, references, questions, facts.get(row.id, {}))


def _collect(
    source: Source, wanted: tuple[str, ...], shares: tuple[float, float]
) -> tuple[dict[str, list[Row]], Counter]:
    rows: dict[str, list[Row]] = {name: [] for name in wanted}
    counts: Counter = Counter()
    for row in source.rows():
        name = _split_of(row, shares)
        counts[name] += 1
        if name in rows:
            rows[name].append(row)
    return rows, counts


def open_split(
    dataset: str,
    split: str | None = None,
    limit: int | None = None,
    validation_share: float = 0.05,
    test_share: float = 0.05,
    **options: Any,
) -> Split:
    """Open the examples to evaluate on.

    Args:
        dataset: anything that `open_rows` takes.
        split: `train`, `validation` or `test`. None takes test, or validation if there is no test split, or the train
            split with a warning if there is neither.
        limit: use only this many images, the first ones.
        options: columns and other options of `open_rows`.

    Raises:
        UserError: there is no such split, or it has no image.
    """
    shares = (validation_share, test_share)
    source = open_rows(dataset, **options)
    wanted = (normalize_split(split),) if split is not None else ("test", "validation")
    if wanted[0] is None:
        raise UserError(f"split {split!r} is none of train, validation, test")
    rows, counts = _collect(source, wanted, shares)
    name = next((name for name in wanted if rows[name]), None)
    if name is None and split is None and counts["train"]:
        # everything is one split (a folder of photos without a split column is divided by hash, so this is a declared one)
        logger.warning("%s has neither a test nor a validation split: evaluating on its train split", dataset)
        name, (rows, _) = "train", _collect(source, ("train",), shares)
    if name is None:
        sizes = ", ".join(f"{n} {c}" for n, c in counts.items()) or "no rows"
        raise UserError(f"{dataset}: split {split or 'test'!r} has no images; there are: {sizes}")
    facts, seen = read_facts(dataset), Counter()
    examples = [_example(row, facts, seen) for row in rows[name][:limit]]
    names = category_names(source.features)
    return Split(dataset, name, examples, counts, source.fingerprint, None if names is None else tuple(names))
