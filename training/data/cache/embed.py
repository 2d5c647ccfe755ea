"""`blipren embed`: the frozen encoder runs once on every image, and training reads Arrow from then on."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blipren.training.commands.embed import EmbedSettings
from blipren.training.data.cache.builder import CacheBuilder, CacheLock, UnitWriter, as_json, refuse_difference
from blipren.training.data.cache.encoder import Encoder, to_storage
from blipren.training.data.cache.prepare import (
    Batch,
    PrepareConfig,
    Prepared,
    Workers,
    default_workers,
    pixel_bytes,
    rejection,
)
from blipren.training.data.cache.reader import FeatureCache
from blipren.training.data.cache.refilter import refilter
from blipren.training.data.cache.similarity_filter import SimilarityScorer, judge
from blipren.training.data.cache.tokens import name_of_tokens
from blipren.training.data.sources.caption_filter import CaptionFilter, count_captions, summary_table
from blipren.training.data.sources.open_rows import open_rows
from blipren.training.data.sources.rows import Row, Source
from blipren.training.data.sources.splits import SPLITS
from blipren.training.engine.loading import load_checkpoint
from blipren.training.errors import UserError
from blipren.training.files import report_full_disk, write_atomically


def caption_filter(s: EmbedSettings) -> CaptionFilter:
    """The rules that the settings switch on."""
    return CaptionFilter(**{name: getattr(s, name) for name in CaptionFilter.__dataclass_fields__})


def cache_fingerprint(s: EmbedSettings, source: Source, encoder: Encoder) -> dict[str, Any]:
    """Everything that decides the content of the cache, and nothing else."""
    return {
        "encoder": encoder.fingerprint,
        "storage": {
            "dtype": s.dtype,
            "computed_in": encoder.precision,
            "views": s.views,
            **({"view_scale": s.view_scale, "view_flip": s.view_flip} if s.views > 1 else {}),
            "rows_per_shard": s.rows_per_shard,
            "batch_size": s.batch_size,
        },
        "source": {"dataset": source.fingerprint, "columns": source.columns.describe(), "limit": s.limit},
        "splits": {
            "validation_share": s.validation_share,
            "test_share": s.test_share,
            "near_duplicates": s.near_duplicates,
        },
        "captions": caption_filter(s).as_dict() | {"min_similarity": s.min_similarity, "keep_best": s.keep_best},
    }


class Progress:
    """One line that is written over: images, images/s, time left."""

    def __init__(self, total: int | None, done: int):
        self.total, self.done, self.first = total, done, done
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
        line = f"embed {self.done:,}"
        if self.total:
            left = (self.total - self.done) / max(1e-9, self.rate)
            line += f"/{self.total:,} rows {self.done / self.total:4.0%}  {self.rate:,.1f} rows/s  {left:,.0f} s left "
        else:
            line += f" rows  {self.rate:,.1f} rows/s "
        print(line, end=end, file=sys.stderr, flush=True)


def make_tasks(
    source: Source,
    builder: CacheBuilder,
    rows_per_batch: int,
    limit: int | None,
    tasks: list[tuple[int, bool]],
    only: int | None = None,
) -> Iterator[list[Row]]:
    """Rows of the units that are not done, in batches that never cross units; `tasks` notes `(unit, is its last)`.

    Sources that can, start behind the units that are done.

    Args:
        only: this unit alone.
    """
    size = builder.rows_per_unit
    done = set(builder.done_units()) if only is None else set()
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
            tasks.append((unit, not following))
            yield batch
            batch = following
        if left or only is not None:
            return
        unit += 1


def rows_of(features: torch.Tensor, mask: torch.Tensor | None, batch: Batch, s: EmbedSettings) -> Iterator[tuple]:
    """`(row, flat features of all its views, their scales, patches of a view)` of a batch in its storage type."""
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


def score(batch: Batch, scorer: SimilarityScorer, s: EmbedSettings) -> None:
    """Gives each row the similarities of its captions, and takes those out that the settings refuse."""
    pixels = {name: value[:: s.views] for name, value in batch.pixels.items()}
    captions = [[a for p, a in zip(item.row.prompts, item.row.answers) if p is None] for item in batch.rows]
    for item, found in zip(batch.rows, scorer(pixels, captions)):
        scores = iter(found)
        item.scores = [next(scores) if prompt is None else None for prompt in item.row.prompts]
        out = judge([item.scores[place] for place in item.kept], s.min_similarity, s.keep_best)
        for place, (rule, value) in out.items():
            batch.rejected.append(rejection(item.row, "text", rule, value, item.answers[place]))
        left = [place for place in range(len(item.answers)) if place not in out]
        item.prompts, item.answers = [item.prompts[i] for i in left], [item.answers[i] for i in left]


def add_row(unit: UnitWriter, item: Prepared, *stored: Any) -> None:
    """Into the cache, unless similarity left the row without a text."""
    if item.answers or item.row.messages:
        unit.add(item, *stored)
    else:
        unit.rejected.append(rejection(item.row, "row", "no_caption", "min_similarity"))


def run_units(
    s: EmbedSettings,
    source: Source,
    encoder: Encoder,
    builder: CacheBuilder,
    config: PrepareConfig,
    scorer: SimilarityScorer | None = None,
    only: int | None = None,
) -> Progress:
    """Embeds what is not done yet, or one unit."""
    total = source.num_rows if s.limit is None else min(s.limit, source.num_rows or s.limit)
    finished = builder.done_units() if only is None else []
    done = sum(json.loads(builder.unit_path(number).read_text())["rows"] for number in finished)
    progress = Progress(total, done)
    if finished:
        print(f"going on behind {len(finished)} finished shards ({done:,} rows)")
    rows_per_batch = max(1, s.batch_size // s.views)
    notes: list[tuple[int, bool]] = []
    workers = default_workers() if s.workers is None else s.workers
    unit: UnitWriter | None = None
    try:
        with (
            report_full_disk(builder.folder),
            Workers(config, workers, pixel_bytes(config, rows_per_batch * s.views)) as pool,
        ):
            tasks = make_tasks(source, builder, rows_per_batch, s.limit, notes, only)
            for number, batch in enumerate(pool.map(tasks)):
                which, last = notes[number]
                if unit is None:
                    unit = UnitWriter(builder, which)
                unit.rows += batch.num_rows
                unit.texts += batch.num_texts
                if batch.rows:
                    features, mask = encoder(batch.pixels)
                    if scorer is not None:
                        score(batch, scorer, s)
                    for row in rows_of(features, mask, batch, s):
                        add_row(unit, *row)
                unit.rejected += batch.rejected
                progress.add(batch.num_rows)
                if last:
                    builder.finish(unit)
                    unit = None
            builder.wait()
    finally:
        if unit is not None:
            unit.abandon()
        builder.close()
    if only is None:
        progress.show("\n")
    return progress


def describe_plan(s: EmbedSettings, source: Source, encoder: Encoder, values: int | None) -> str:
    """What will be done, in numbers."""
    stored = {"float16": 2, "float32": 4, "int8": 1}[s.dtype]
    width = encoder.hidden_size
    lines = [f"embed {source.describe()}", f"with {s.model} on {encoder.device} in {encoder.precision} -> {s.cache}"]
    if values:
        each = values * stored + (values // width * 4 if s.dtype == "int8" else 0)
        shape = f"{values // width // s.views} patches x {width} x {s.dtype}" + (
            f" x {s.views}" if s.views > 1 else ""
        )
        total = f", {each * source.num_rows / 2**30:,.2f} GiB in all" if source.num_rows else ""
        lines.append(f"{shape} = {each:,} bytes an image{total}")
    return "\n".join(lines)


def dry_run(s: EmbedSettings, source: Source, config: PrepareConfig) -> None:
    """Shows what would be cached and what would be rejected, and writes nothing."""
    config.encode = False
    rejected: list[dict[str, Any]] = []
    rows = texts = 0
    splits: dict[str, int] = {}
    with Workers(config, default_workers() if s.workers is None else s.workers, 0) as pool:
        everything = source.rows() if s.limit is None else itertools.islice(source.rows(), s.limit)
        for batch in pool.map(iter(lambda: list(itertools.islice(everything, 64)), [])):
            rows += batch.num_rows
            texts += batch.num_texts
            rejected += batch.rejected
            for item in batch.rows:
                splits[item.split] = splits.get(item.split, 0) + 1
    print(summary_table(rejected, rows, texts))
    counts = ", ".join(f"{split} {splits.get(split, 0):,}" for split in ("train", "validation", "test"))
    print(f"dry run: of {rows:,} rows {sum(splits.values()):,} would be cached ({counts}); nothing was written")


def report(cache: dict[str, Any], folder: Path) -> None:
    """The summary at the end."""
    counts = cache["counts"]
    with open(folder / "rejected.jsonl", encoding="utf-8") as file:
        print(summary_table(map(json.loads, file), counts["rows"], counts["texts"]))
    for name, count in counts["duplicates"].items():
        if count:
            print(f"{name.replace('_', ' ')}: {count:,}")
    print(
        f"{counts['rows']:,} rows = {counts['cached']:,} cached (train {counts['train']:,}, validation "
        f"{counts['validation']:,}, test {counts['test']:,}) + {counts['rejected']:,} rejected"
    )
    print(f"{cache['bytes'] / 2**30:,.2f} GiB in {folder}; rejections in {folder / 'rejected.jsonl'}")


def verify(s: EmbedSettings) -> int:
    """Checks every byte of a cache; exit status 1 when one differs."""
    cache = FeatureCache.open(s.cache)
    print(f"verify {cache.folder}: {cache.info['bytes'] / 2**30:,.2f} GiB")
    faults = cache.verify()
    for fault in faults:
        print(fault)
    print(f"{len(faults)} damaged files" if faults else "all checksums are right")
    return 1 if faults else 0


@dataclass
class Job:
    """All that embedding a unit needs; made from the settings alone, so that every worker makes the same."""

    source: Source
    processor: Any
    encoder: Encoder
    config: PrepareConfig
    scorer: SimilarityScorer | None
    num_patches: int | None
    values: int | None
    fingerprint: dict[str, Any]

    @classmethod
    def make(cls, s: EmbedSettings) -> Job:
        """Opens data and model. Raises `UserError`."""
        source = open_rows(s.dataset, seed=s.seed, **s.source_options())
        rules = caption_filter(s)
        counts = None
        if rules.max_images_per_caption:
            counts = count_captions((row.prompts, row.answers) for row in source)
        model, processor = load_checkpoint(s.model)
        encoder = Encoder(model, processor.image_processor, s.device, s.precision)
        config = PrepareConfig(
            image_processor=processor.image_processor,
            rules=rules,
            caption_counts=counts,
            validation_share=s.validation_share,
            test_share=s.test_share,
            views=s.views,
            view_scale=s.view_scale,
            view_flip=s.view_flip,
            variable=encoder.variable,
        )
        scorer = None
        if s.min_similarity is not None or s.keep_best is not None:
            scorer = SimilarityScorer((model.config.base_models or {}).get("vision") or {}, encoder.device)
        patches = None if encoder.variable else encoder.measure()
        values = None if patches is None else patches * encoder.hidden_size * s.views
        return cls(source, processor, encoder, config, scorer, patches, values, cache_fingerprint(s, source, encoder))

    def builder(self, s: EmbedSettings, folder: Path, kind: type[CacheBuilder] = CacheBuilder) -> CacheBuilder:
        """The cache's writer."""
        return kind(
            folder,
            self.fingerprint,
            dtype=s.dtype,
            values=self.values,
            tokens=None if self.num_patches is None else self.num_patches * s.views,
            hidden_size=self.encoder.hidden_size,
            messages=bool(self.source.columns.messages),
            rows_per_unit=s.rows_per_shard,
            near_duplicates=s.near_duplicates,
            scores=self.scorer is not None,
        )

    def finish(self, s: EmbedSettings, builder: CacheBuilder) -> dict[str, Any]:
        """From finished units to a finished cache, and its summary."""
        if not builder.done_units():
            shutil.rmtree(builder.folder / "units")
            raise UserError(f"{s.dataset} has no rows")
        cache = builder.finalize({"views": s.views, "num_patches": self.num_patches})
        report(cache, builder.folder)
        if not cache["counts"]["cached"]:
            raise UserError(f"no row of {s.dataset} could be cached; the reasons are in {s.cache}/rejected.jsonl")
        return cache


def embed(s: EmbedSettings) -> int | None:
    """Embeds a data set into a feature cache; resumes an unfinished one; refuses one that was made otherwise.

    Raises:
        UserError: nothing there to read, a cache of another model or with other settings, no space left, bad features.
    """
    if s.verify:
        return verify(s)
    job = Job.make(s)
    print(describe_plan(s, job.source, job.encoder, job.values))
    if s.dry_run:
        return dry_run(s, job.source, job.config)
    if s.engine == "ray":
        from blipren.training.data.cache.ray_engine import embed_with_ray

        return embed_with_ray(s, job)
    folder = Path(s.cache)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; CACHE is a folder")
    with CacheLock(folder):
        if (folder / "cache.json").exists():
            reuse(s, folder, job.fingerprint, job.config.rules)
        else:
            builder = job.builder(s, folder)
            builder.start()
            run_units(s, job.source, job.encoder, builder, job.config, job.scorer)
            job.finish(s, builder)
        tokenize(folder, job.processor)
    return None


def tokenize(folder: Path, processor: Any) -> None:
    """Builds the token ids for the model's tokenizer and template, and notes in `cache.json` what decides them."""
    started = time.monotonic()
    cache = FeatureCache.open(folder)
    tokens = sum(len(cache.tokens(split, processor).ids) for split in SPLITS)
    name, fingerprint = name_of_tokens(cache.info, processor)
    if name not in cache.info.get("tokens", {}):
        cache.info.setdefault("tokens", {})[name] = fingerprint
        write_atomically(folder / "cache.json", as_json(cache.info))
        print(f"{tokens:,} token ids in {folder / 'tokens' / name} ({time.monotonic() - started:.1f} s)")


def reuse(s: EmbedSettings, folder: Path, fingerprint: dict[str, Any], rules: CaptionFilter) -> None:
    """A finished cache: left as it is, given other texts where only the caption filter differs, or refused."""
    cache = FeatureCache.open(folder)
    prints = (cache.fingerprint, fingerprint)
    refuse_difference(*({k: v for k, v in each.items() if k != "captions"} for each in prints), folder)
    current = cache.info.get("captions") or {"settings": cache.fingerprint["captions"]}
    if current["settings"] == fingerprint["captions"]:
        print(f"{folder} is complete: nothing to embed")
    else:
        refilter(folder, cache.info, fingerprint["captions"], rules)
