"""Embedding in this process, with workers that prepare the rows."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from blipren.training.commands.embed import EmbedSettings
from blipren.training.data.cache.encoder import Encoder, to_storage
from blipren.training.data.cache.engines.workers import Workers, default_workers
from blipren.training.data.cache.prepare import PrepareConfig, Prepared, PreparedBatch, pixel_bytes, rejection
from blipren.training.data.cache.similarity_filter import SimilarityScorer, refuse_by_similarity
from blipren.training.data.cache.writer.units import CacheWriter, UnitWriter
from blipren.training.data.sources.rows import Row, Source
from blipren.training.files import report_full_disk


class Progress:
    """A progress line: rows, rows/s, time left. A terminal shows it in place, a log has a line every 30 seconds."""

    def __init__(self, total: int | None, done: int, verb: str = "embed"):
        self.total, self.done, self.first, self.verb = total, done, done, verb
        self.started = self._shown = time.monotonic()
        self.live = sys.stderr.isatty()

    @property
    def rate(self) -> float:
        return (self.done - self.first) / max(1e-9, time.monotonic() - self.started)

    def add(self, rows: int) -> None:
        self.done += rows
        now = time.monotonic()
        if now - self._shown >= (0.5 if self.live else 30):
            self._shown = now
            self.show("\r" if self.live else "\n")

    def show(self, end: str) -> None:
        line = f"{self.verb} {self.done:,}"
        if self.total:
            left = (self.total - self.done) / max(1e-9, self.rate)
            line += f"/{self.total:,} rows {self.done / self.total:4.0%}  {self.rate:,.1f} rows/s  {left:,.0f} s left "
        else:
            line += f" rows  {self.rate:,.1f} rows/s "
        print(line, end=end, file=sys.stderr, flush=True)


def embed_units(
    s: EmbedSettings,
    source: Source,
    encoder: Encoder,
    cache: CacheWriter,
    config: PrepareConfig,
    scorer: SimilarityScorer | None = None,
    only: int | None = None,
) -> Progress:
    """Embed the units that are not done.

    Args:
        only: the number of the one unit to embed.
    """
    total = source.num_rows if s.limit is None else min(s.limit, source.num_rows or s.limit)
    finished = cache.done_units() if only is None else []
    done = sum(json.loads(cache.unit_path(number).read_text())["rows"] for number in finished)
    progress = Progress(total, done)
    if finished:
        print(f"continuing after {len(finished)} finished shards ({done:,} rows)")
    frames = s.views * (config.num_frames or 1)
    rows_per_batch = max(1, s.batch_size // (frames * encoder.pieces))
    units: list[tuple[int, bool]] = []
    workers = default_workers() if s.workers is None else s.workers
    unit: UnitWriter | None = None
    try:
        with (
            report_full_disk(cache.folder),
            Workers(config, workers, pixel_bytes(config, rows_per_batch * frames)) as pool,
        ):
            batches = batch_rows(source, cache, rows_per_batch, s.limit, units, only)
            for number, batch in enumerate(pool.map(batches)):
                unit_number, is_last = units[number]
                if unit is None:
                    unit = UnitWriter(cache, unit_number)
                unit.rows += batch.num_rows
                unit.texts += batch.num_texts
                if batch.rows:
                    features, mask = encoder(batch.pixels, config.num_frames)
                    if scorer is not None:
                        filter_by_similarity(batch, scorer, s)
                    for row in split_features(features, mask, batch, s):
                        add_row(unit, *row)
                unit.rejected += batch.rejected
                progress.add(batch.num_rows)
                if is_last:
                    cache.finish(unit)
                    unit = None
            cache.wait()
    finally:
        if unit is not None:
            unit.abandon()
        cache.close()
    if only is None:
        progress.show("\n")
    return progress


def batch_rows(
    source: Source,
    cache: CacheWriter,
    rows_per_batch: int,
    limit: int | None,
    units: list[tuple[int, bool]],
    only: int | None = None,
) -> Iterator[list[Row]]:
    """Yield the rows of the units that are not done, in batches of one unit.

    Args:
        units: receives `(unit, whether the batch is the last of its unit)` for each batch.
        only: the number of the one unit to read.
    """
    size = cache.rows_per_unit
    done = set(cache.done_units()) if only is None else set()
    unit = only or 0
    while unit in done:
        unit += 1
    rows = source.rows(unit * size)
    if limit is not None:
        rows = itertools.islice(rows, max(0, limit - unit * size))
    while True:
        if unit in done:
            if len(list(itertools.islice(rows, size))) < size:
                return
            unit += 1
            continue
        left = size
        batch = list(itertools.islice(rows, min(rows_per_batch, left)))
        while batch:
            left -= len(batch)
            following = list(itertools.islice(rows, min(rows_per_batch, left))) if left else []
            units.append((unit, not following))
            yield batch
            batch = following
        if left or only is not None:
            return
        unit += 1


def split_features(
    features: torch.Tensor, mask: torch.Tensor | None, batch: PreparedBatch, s: EmbedSettings
) -> Iterator[tuple]:
    """Yield `(row, flat features of all its views, their scales, patches of a view)` in the type of storage."""
    names = [item.row.id for item in batch.rows for _ in range(s.views)]
    values, scales = to_storage(features, s.dtype, names)
    lengths = mask.sum(dim=1).cpu().numpy() if mask is not None else np.full(len(values), values.shape[1])
    for number, item in enumerate(batch.rows):
        own = slice(number * s.views, (number + 1) * s.views)
        count = int(lengths[own][0])
        if not (lengths[own] == count).all():
            raise ValueError(f"row {item.row.id}: its views have {lengths[own].tolist()} patches; they must be equal")
        yield (
            item,
            values[own, :count].reshape(-1),
            None if scales is None else np.ascontiguousarray(scales[own, :count]).reshape(-1),
            count,
        )


def filter_by_similarity(batch: PreparedBatch, scorer: SimilarityScorer, s: EmbedSettings) -> None:
    """Score the captions of each row against its image, and remove those that the settings refuse."""
    pixels = {name: value[:: s.views] for name, value in batch.pixels.items()}
    captions = [[a for p, a in zip(item.row.prompts, item.row.answers) if p is None] for item in batch.rows]
    for item, found in zip(batch.rows, scorer(pixels, captions)):
        scores = iter(found)
        item.scores = [next(scores) if prompt is None else None for prompt in item.row.prompts]
        refused = refuse_by_similarity([item.scores[place] for place in item.kept], s.min_similarity, s.keep_best)
        for place, (rule, value) in refused.items():
            batch.rejected.append(rejection(item.row, "text", rule, value, item.answers[place]))
        left = [place for place in range(len(item.answers)) if place not in refused]
        item.prompts, item.answers = [item.prompts[i] for i in left], [item.answers[i] for i in left]


def add_row(unit: UnitWriter, item: Prepared, *stored: Any) -> None:
    """Add a row to the cache, or reject it where the similarity filter left no text."""
    if item.answers or item.row.shown:
        unit.add(item, *stored)
    else:
        unit.rejected.append(rejection(item.row, "row", "no_caption", "min_similarity"))
