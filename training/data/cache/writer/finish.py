"""From finished units to a finished cache. `cache.json` is written last: a folder without it is no cache yet."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from typing import Any

from blipren.training.data.cache.fingerprints import library_versions
from blipren.training.data.cache.samples.collect import SampleImages
from blipren.training.data.cache.samples.table import write_samples
from blipren.training.data.cache.shards import ShardWriter, as_json, write_dataset_files
from blipren.training.data.cache.writer.duplicates import find_duplicates
from blipren.training.data.cache.writer.units import CacheWriter
from blipren.training.data.sources.splits import SPLITS
from blipren.training.files import write_atomically

FORMAT = 1


def finish_cache(
    cache: CacheWriter, description: dict[str, Any], samples: SampleImages | None = None
) -> dict[str, Any]:
    """Remove duplicates and write the small files, `cache.json` last. It can be repeated after a kill.

    Args:
        description: further entries of `cache.json`.
        samples: the conversations, whose images are the rows of the cache.

    Returns:
        The content of `cache.json`.
    """
    cache.wait()
    started = time.time()
    duplicates, duplicate_counts = find_duplicates(cache)
    shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    rows = {split: 0 for split in SPLITS}
    reasons: dict[str, dict[str, int]] = {"row": {}, "text": {}}
    total_rows = total_texts = rejected_rows = 0
    units, lines = [], []
    for record in cache.records():
        removed = duplicates.get(record["unit"], {})
        if removed and record.get("taken_out") is None:
            record = cache.remove_rows(record, removed)
        for split, shard in record["shards"].items():
            shards[split].append(shard)
            rows[split] += shard["rows"]
        total_rows += record["rows"]
        total_texts += record["texts"]
        for line in record["rejected"]:
            reasons[line["kind"]][line["reason"]] = reasons[line["kind"]].get(line["reason"], 0) + 1
            rejected_rows += line["kind"] == "row"
            lines.append(json.dumps(line, ensure_ascii=False))
        if record["index"]:
            units.append({"unit": record["unit"], **record["index"], "taken_out": record.get("taken_out", [])})
    for split in SPLITS:
        if not shards[split]:  # every split has a shard
            shards[split].append(ShardWriter(cache.folder / split / "data-empty.arrow", cache.columns).finish())
        keep = {shard["file"] for shard in shards[split]}
        for path in (cache.folder / split).glob("data-*"):
            if path.name.removesuffix(".sums") not in keep:
                path.unlink()
    cached = sum(rows.values())
    if cached + rejected_rows != total_rows:
        raise RuntimeError(f"{total_rows} rows went in, {cached} cached and {rejected_rows} rejected came out")
    tables: dict[str, Any] = {}
    if samples is not None:
        shares = tuple(cache.fingerprint["splits"][name] for name in ("validation_share", "test_share"))
        places, why = _image_places(cache, samples, map(json.loads, lines))
        tables, counts, refused = write_samples(
            cache.folder, samples, places, why, shares, str(cache.fingerprint["source"]["dataset"])
        )
        reasons["sample"] = {}
        for line in [*samples.rejected_texts, *refused]:
            reasons[line["kind"]][line["reason"]] = reasons[line["kind"]].get(line["reason"], 0) + 1
            lines.append(json.dumps(line, ensure_ascii=False))
    rejected = "".join(line + "\n" for line in lines).encode()
    write_atomically(cache.folder / "rejected.jsonl", rejected)
    content = hashlib.sha256(rejected)
    for split in SPLITS:
        for shard in shards[split]:
            content.update(f"{split}/{shard['file']}:{shard['xxh3_128']}".encode())
        if split in tables:
            content.update(f"samples/{split}:{tables[split]['xxh3_128']}".encode())
    info = {
        "format": FORMAT,
        "content_hash": content.hexdigest(),
        "fingerprint": cache.fingerprint,
        "counts": {
            "rows": total_rows,
            "cached": cached,
            "rejected": rejected_rows,
            **rows,
            "texts": total_texts,
            "rejected_by_reason": reasons,
            "duplicates": duplicate_counts,
            **({"samples": counts} if samples is not None else {}),
        },
        "columns": list(cache.columns),
        "dtype": cache.dtype,
        "hidden_size": cache.hidden_size,
        **description,
        "bytes": sum(shard["bytes"] for split in SPLITS for shard in shards[split]),
        "shards": shards,
        "index": units,
        **({"samples": tables} if samples is not None else {}),
        "versions": library_versions(),
    }
    names = {split: [shard["file"] for shard in shards[split]] for split in SPLITS}
    write_dataset_files(cache.folder, cache.columns, names, info["content_hash"])
    info["finalize_seconds"] = round(time.time() - started, 2)
    write_atomically(cache.folder / "cache.json", as_json(info))
    return info


def _image_places(
    cache: CacheWriter, samples: SampleImages, rejected: Iterable[dict[str, Any]]
) -> tuple[dict[str, tuple[str, int]], dict[int, str]]:
    """Return content hash -> (split, row) of the images that are cached, and number -> reason of those that are not."""
    rows = {split: 0 for split in SPLITS}
    places: dict[str, tuple[str, int]] = {}
    for record in cache.records():
        if not record["index"]:
            continue
        index, gone = cache.read_index(record), set(record.get("taken_out", []))
        for place, (digest, split) in enumerate(zip(index["image_hash"], index["split"])):
            if place not in gone:
                places[digest] = (split, rows[split])
                rows[split] += 1
    numbers = {name: number for number, name in enumerate(samples.ids)}
    why = {numbers[line["id"]]: f"{line['reason']}: {line['value']}" for line in rejected if line["kind"] == "row"}
    return places, why
