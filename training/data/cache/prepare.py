"""What happens to a row before the encoder, in worker processes: texts filtered, bytes decoded, views cut, pixels made.

The pixels travel in memory that is shared between the processes, so that the encoder reads what a worker wrote.
"""

from __future__ import annotations

import collections
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from blipren.training.data.cache.encoder import PIXEL_INPUTS
from blipren.training.data.cache.views import can_be_mirrored, cut_view
from blipren.training.data.sources.caption_filter import CaptionFilter, filter_texts
from blipren.training.data.sources.images import ImageError
from blipren.training.data.sources.near_duplicates import image_signature
from blipren.training.data.sources.rows import Row
from blipren.training.data.sources.splits import split_by_hash
from blipren.training.errors import UserError


@dataclass(kw_only=True)
class PrepareConfig:
    """What the workers need beside the rows."""

    image_processor: Any
    rules: CaptionFilter = field(default_factory=CaptionFilter)
    caption_counts: Counter[str] | None = None
    validation_share: float = 0.05
    test_share: float = 0.05
    views: int = 1
    view_scale: float = 0.6
    view_flip: bool = True
    variable: bool = False
    encode: bool = True
    """False for a dry run: no pixels are made."""


@dataclass
class Prepared:
    """A row that will be cached: everything but its features."""

    row: Row
    split: str
    image_hash: str
    phash: int
    thumb: np.ndarray
    prompts: list[str | None]
    answers: list[str]
    kept: list[int]
    """Which of the row's own texts these are."""
    scores: list[float | None] | None = None
    """Similarity of each of the row's own texts to the image, where it was asked for."""


@dataclass
class Batch:
    """Rows of a batch with their pixels, `views` in a row for each, and what was rejected on the way."""

    rows: list[Prepared]
    pixels: dict[str, Any]
    rejected: list[dict[str, Any]]
    num_rows: int
    """Rows that went in: cached and rejected together."""
    num_texts: int


def rejection(row: Row, kind: str, reason: str, value: str, text: str | None = None) -> dict[str, Any]:
    """A line of `rejected.jsonl`."""
    line = {"kind": kind, "id": row.id, "row": row.index, "reason": reason, "value": value[:500]}
    return line if text is None else line | {"text": text[:200]}


def prepare_row(row: Row, config: PrepareConfig) -> tuple[Prepared | None, list[Image.Image], list[dict[str, Any]]]:
    """One row: what to cache of it, its views as images, and what of it was rejected (a row, or some of its texts)."""
    rejected = [rejection(row, "text", rule, value) for rule, value in row.problems]
    if row.rejected:
        return None, [], [*rejected, rejection(row, "row", *row.rejected)]
    left = filter_texts(row.prompts, row.answers, config.rules, config.caption_counts)
    rejected += [rejection(row, "text", rule, value, text) for rule, value, text in left.rejected]
    if not left.answers and not row.messages:
        why = rejected[0]["reason"] if rejected else "no text in its columns"
        return None, [], [*rejected, rejection(row, "row", "no_caption", why)]
    try:
        image_hash = row.image_hash()
        image = row.load()
    except ImageError as error:
        return None, [], [*rejected, rejection(row, "row", error.reason, error.detail)]
    split = row.split or split_by_hash(image_hash, config.validation_share, config.test_share)
    phash, thumb = image_signature(image)
    prepared = Prepared(row, split, image_hash, phash, thumb, left.prompts, left.answers, left.kept)
    flip = config.view_flip and can_be_mirrored([*left.answers, *left.prompts])
    views = [
        cut_view(image, view, image_hash, flip, config.view_scale, config.variable) for view in range(config.views)
    ]
    return prepared, views, rejected


def _pixels(images: list[Image.Image], config: PrepareConfig) -> dict[str, torch.Tensor]:
    inputs = config.image_processor(images=images, return_tensors="pt")
    return {name: inputs[name] for name in PIXEL_INPUTS if name in inputs}


def prepare_batch(rows: list[Row], config: PrepareConfig) -> Batch:
    """Rows to a batch. No row's fault is raised: it becomes a rejection, and the rest go on."""
    kept, images, rejected = [], [], []
    texts = 0
    for row in rows:
        texts += len(row.answers) + len(row.problems)
        prepared, views, lines = prepare_row(row, config)
        rejected += lines
        if prepared is not None:
            kept.append(prepared)
            images.append(views)
    pixels: dict[str, Any] = {}
    if kept and config.encode:
        try:
            pixels = _pixels([view for views in images for view in views], config)
        except (ValueError, TypeError, ZeroDivisionError, MemoryError, OverflowError):
            # One shape that the image processor cannot take fails them all: find which.
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
    for prepared in kept:  # undecoded bytes have done their duty, and would travel back
        prepared.row.image = prepared.row._data = None
    return Batch(kept, pixels, rejected, len(rows), texts)


# ---- worker processes ----------------------------------------------------------------------------------------------

_shared: dict[str, Any] = {}


def _end_with(parent: int) -> None:
    """Ends this process when its parent was killed: an orphan would hold memory, and the cache's lock."""
    while os.getppid() == parent:
        time.sleep(0.25)
    os._exit(1)


def _start_worker(config: PrepareConfig, slots: list[mmap.mmap] | None, parent: int) -> None:
    torch.set_num_threads(1)  # as in a DataLoader's worker: one process a core, and no thread pool after a fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _shared.update(config=config, slots=slots)


def _work(rows: list[Row], slot: int | None) -> Batch:
    batch = prepare_batch(rows, _shared["config"])
    slots = _shared["slots"]
    size = sum(tensor.nbytes for tensor in batch.pixels.values())
    if slots is None or slot is None or size > len(slots[slot]):
        batch.pixels = {name: tensor.numpy() for name, tensor in batch.pixels.items()}
        return batch
    offset = 0
    for name, tensor in batch.pixels.items():
        array = tensor.contiguous().numpy()
        target = np.frombuffer(slots[slot], array.dtype, array.size, offset).reshape(array.shape)
        target[...] = array
        batch.pixels[name] = (slot, offset, str(array.dtype), array.shape)
        offset += -(-array.nbytes // 64) * 64
    return batch


class Workers:
    """Worker processes that prepare batches ahead of the encoder, in order, never more than a few at a time.

    Args:
        config: what to do.
        workers: processes; 0 prepares in this one.
        slot_bytes: pixels of a full batch, which a worker hands over through shared memory.
    """

    def __init__(self, config: PrepareConfig, workers: int, slot_bytes: int):
        self.config, self.workers = config, workers
        self.in_flight = 2 * workers + 1
        self._pool: ProcessPoolExecutor | None = None
        self._slots: list[mmap.mmap] | None = None
        if workers:
            method = "fork" if sys.platform == "linux" else "spawn"
            if method == "fork" and slot_bytes:  # anonymous shared memory: not limited by the size of /dev/shm
                self._slots = [mmap.mmap(-1, slot_bytes + 4096) for _ in range(self.in_flight + 1)]
            self._pool = ProcessPoolExecutor(
                workers,
                mp_context=multiprocessing.get_context(method),
                initializer=_start_worker,
                initargs=(config, self._slots, os.getpid()),
            )

    def map(self, tasks: Iterable[list[Row]]) -> Iterator[Batch]:
        """Batches in the order of the tasks. A batch's pixels are valid until the next one is asked for."""
        if self._pool is None:
            for rows in tasks:
                yield prepare_batch(rows, self.config)
            return
        waiting: collections.deque[Future[Batch]] = collections.deque()
        slot, count = 0, len(self._slots or [None])
        try:
            for rows in tasks:
                waiting.append(self._pool.submit(_work, rows, slot))
                slot = (slot + 1) % count
                if len(waiting) >= self.in_flight:
                    yield self._open(waiting.popleft().result())
            while waiting:
                yield self._open(waiting.popleft().result())
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, mostly for want of memory: use fewer --workers or a smaller "
                "--batch-size; the same command goes on behind the last finished shard"
            ) from error

    def _open(self, batch: Batch) -> Batch:
        pixels = {}
        for name, value in batch.pixels.items():
            if isinstance(value, tuple):
                slot, offset, dtype, shape = value
                count = int(np.prod(shape))
                value = np.frombuffer(self._slots[slot], dtype, count, offset).reshape(shape)
            pixels[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        batch.pixels = pixels
        return batch

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def default_workers() -> int:
    """One less than the cores that this process may use, at least one, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(16, cores - 1))


def pixel_bytes(config: PrepareConfig, batch_size: int) -> int:
    """Bytes of a full batch's pixels, measured on one blank image."""
    pixels = _pixels([Image.new("RGB", (320, 240))], config)
    return sum(tensor.nbytes + 64 for tensor in pixels.values()) * batch_size
