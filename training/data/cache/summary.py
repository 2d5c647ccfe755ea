"""What `blipren embed` prints: the plan, the dry run, the summary, the result of `--verify`."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from blipren.training.commands.embed import EmbedSettings
from blipren.training.data.cache.encoder import Encoder
from blipren.training.data.cache.engines.workers import Workers, default_workers
from blipren.training.data.cache.prepare import PrepareConfig
from blipren.training.data.cache.reader import FeatureCache
from blipren.training.data.cache.samples.collect import SampleImages
from blipren.training.data.sources.caption_filter import summary_table
from blipren.training.data.sources.rows import Source


def describe_plan(s: EmbedSettings, source: Source, encoder: Encoder, values: int | None) -> str:
    """Return what will be embedded, with its size.

    Args:
        values: features of a row; None where rows differ.
    """
    stored = {"float16": 2, "float32": 4, "int8": 1}[s.dtype]
    width = encoder.hidden_size
    lines = [f"embed {source.describe()}", f"with {s.model} on {encoder.device} in {encoder.precision} -> {s.cache}"]
    if values:
        each = values * stored + (values // width * 4 if s.dtype == "int8" else 0)
        shape = f"{values // width // s.views} patches x {width} x {s.dtype}" + (
            f" x {s.views}" if s.views > 1 else ""
        )
        if encoder.pieces > 1:
            shape += f" (of {encoder.pieces} pieces)"
        kind = "a video" if source.columns.video else "an image"
        total = f", {each * source.num_rows / 2**30:,.2f} GiB in all" if source.num_rows else ""
        lines.append(f"{shape} = {each:,} bytes {kind}{total}")
    elif s.dtype != "int8" and encoder.tile_patches:
        most = encoder.pieces * encoder.tile_patches * width * stored * s.views
        lines.append(
            f"{encoder.tile_patches} patches a piece x {width} x {s.dtype}, at most {encoder.pieces} pieces = at most "
            f"{most:,} bytes an image"
        )
    return "\n".join(lines)


def dry_run(s: EmbedSettings, source: Source, config: PrepareConfig) -> None:
    """Print what would be cached and what would be rejected."""
    config.encode = False
    rejected: list[dict[str, Any]] = list(source.rejected) if isinstance(source, SampleImages) else []
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


def print_summary(info: dict[str, Any], folder: Path) -> None:
    """Print what a finished cache holds. `info` is the content of its `cache.json`."""
    counts = info["counts"]
    with open(folder / "rejected.jsonl", encoding="utf-8") as file:
        print(summary_table(map(json.loads, file), counts["rows"], counts["texts"]))
    for name, count in counts["duplicates"].items():
        if count:
            print(f"{name.replace('_', ' ')}: {count:,}")
    print(
        f"{counts['rows']:,} rows = {counts['cached']:,} cached (train {counts['train']:,}, validation "
        f"{counts['validation']:,}, test {counts['test']:,}) + {counts['rejected']:,} rejected"
    )
    if samples := counts.get("samples"):
        print(
            f"conversations: {samples['rows']:,} rows = train {samples['train']:,}, validation "
            f"{samples['validation']:,}, test {samples['test']:,} + {samples['captions_only']:,} with captions alone + "
            f"{samples['rejected']:,} rejected"
        )
    print(f"{info['bytes'] / 2**30:,.2f} GiB in {folder}; rejections in {folder / 'rejected.jsonl'}")


def verify_cache(folder: str) -> int:
    """Check every byte of a cache against its checksums. Returns the exit status: 1 if one differs."""
    cache = FeatureCache.open(folder)
    print(f"verify {cache.folder}: {cache.info['bytes'] / 2**30:,.2f} GiB")
    faults = cache.verify()
    for fault in faults:
        print(fault)
    print(f"{len(faults)} damaged files" if faults else "all checksums are right")
    return 1 if faults else 0
