"""The table of samples of a finished cache: `samples/SPLIT`, which `datasets.load_from_disk` opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from blipren.training.data.cache.samples.collect import SampleImages
from blipren.training.data.cache.shards import write_dataset_files, write_table
from blipren.training.data.sources.images import content_hash
from blipren.training.data.sources.splits import SPLITS, split_by_hash

COLUMNS = datasets.Features(
    {
        "id": datasets.Value("string"),
        # rows of the images, counted over train, validation and test behind each other
        "images": datasets.List(datasets.Value("int32")),
        "messages": datasets.Value("string"),
        "rejected": datasets.Value("string"),
    }
)


def write_samples(
    folder: Path,
    samples: SampleImages,
    rows: dict[str, tuple[str, int]],
    why: dict[int, str],
    shares: tuple[float, float],
    key: str,
) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Write the samples whose images are all in the cache.

    Any held-out image holds a sample out of training. A sample without images is split by its text.

    Args:
        rows: content hash of each cached image -> its split, and its row in it.
        why: number of an image that is not cached -> the reason.
        shares: of validation and test.
        key: fingerprint of the tables.

    Returns:
        Records of the tables by split, counts, and lines of `rejected.jsonl`.
    """
    counts = {split: 0 for split in SPLITS}
    for split, _ in rows.values():
        counts[split] += 1
    first = dict(zip(SPLITS, np.concatenate([[0], np.cumsum(list(counts.values()))]).tolist()))
    tables: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    lines = list(samples.rejected)
    for sample in samples.samples():
        missing = next((n for n in sample["images"] if samples.hashes[n] not in rows), None)
        if missing is not None:
            value = f"image {samples.ids[missing]}: {why.get(missing, 'not cached')}"
            line = {"kind": "sample", "id": sample["id"], "row": sample["row"], "reason": "image", "value": value}
            lines.append(line)
            continue
        places = [rows[samples.hashes[n]] for n in sample["images"]]
        if places:
            split = max((split for split, _ in places), key=SPLITS.index)
        else:
            split = sample["split"] or split_by_hash(content_hash(sample["messages"].encode()), *shares)
        tables[split].append(sample | {"images": [first[own] + row for own, row in places]})
    records = {}
    for split, own in tables.items():
        columns = [
            pa.array([sample[name] for sample in own], COLUMNS.arrow_schema.field(name).type) for name in COLUMNS
        ]
        records[split] = write_table(folder / "samples" / split / "data.arrow", COLUMNS, columns)
    write_dataset_files(folder / "samples", COLUMNS, {split: ["data.arrow"] for split in SPLITS}, key)
    found = {split: len(own) for split, own in tables.items()}
    if sum(found.values()) + samples.captions_only + len(lines) != samples.rows_read:
        raise RuntimeError(f"{samples.rows_read} rows were read; samples {found}, {len(lines)} rejected")
    counts = {"rows": samples.rows_read, **found, "captions_only": samples.captions_only, "rejected": len(lines)}
    return records, counts, lines


def messages_of(text: str) -> list[dict[str, Any]]:
    """Return the messages that a row of the table holds."""
    return json.loads(text)
