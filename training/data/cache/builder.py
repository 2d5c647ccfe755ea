"""Writing a feature cache so that it may be killed at any moment: units of rows, each written apart, then marked.

A unit is `rows_per_shard` rows in reading order. Its shards (one a split) and its index are renamed into place, then
`units/N.json` marks it as done: a unit without mark is redone from its first row, so that a rerun writes the same
bytes. The disk is waited for in the background, while the next unit is embedded; after a power cut the newest units are
therefore checked against their checksums. The last file is `cache.json`: a folder without it is not a cache yet.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import filelock
import numpy as np
import xxhash

from blipren.training.data.cache.encoder import first_difference, library_versions
from blipren.training.data.cache.prepare import Prepared
from blipren.training.data.cache.shards import (
    ShardWriter,
    feature_columns,
    file_checksum,
    iter_rows,
    write_dataset_files,
)
from blipren.training.data.sources.near_duplicates import THUMB, NearIndex
from blipren.training.data.sources.splits import SPLITS
from blipren.training.errors import UserError
from blipren.training.files import flush_to_disk, write_atomically

FORMAT = 1
INDEX_COLUMNS = datasets.Features(
    {
        "id": datasets.Value("string"),
        "split": datasets.Value("string"),
        "image_hash": datasets.Value("string"),
        "phash": datasets.Value("uint64"),
        "prompts": datasets.List(datasets.Value("string")),
        "answers": datasets.List(datasets.Value("string")),
        "thumb": datasets.List(datasets.Value("uint8"), length=THUMB * THUMB * 3),
    }
)


def as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n").encode()


class CacheLock:
    """One writer a cache: a second one says so and waits. Freed by the system when its process dies."""

    def __init__(self, folder: Path, wait: float | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.wait = folder, wait
        self._lock = filelock.FileLock(folder / ".lock")

    def __enter__(self) -> CacheLock:
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            print(f"another process is writing {self.folder}; waiting for it", flush=True)
            try:
                self._lock.acquire(timeout=-1 if self.wait is None else self.wait)
            except filelock.Timeout as error:
                raise UserError(f"another process is still writing {self.folder}; try again later") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def refuse_difference(stored: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raises `UserError` that names the first field in which a folder's fingerprint differs from this command's."""
    stored = json.loads(json.dumps(stored, default=str))
    now = json.loads(json.dumps(now, default=str))
    if found := first_difference(stored, now):
        field, old, new = found
        raise UserError(
            f"{folder} was embedded with {field} = {old!r}, and now it is {new!r}: "
            "choose another CACHE folder, or remove this one"
        )


class UnitWriter:
    """The shards and the index of one unit. `finish` marks it as done."""

    def __init__(self, builder: CacheBuilder, number: int):
        self.builder, self.number = builder, number
        self.rows = self.texts = 0
        self.rejected: list[dict[str, Any]] = []
        self._shards: dict[str, ShardWriter] = {}
        self._index: ShardWriter | None = None

    def add(self, item: Prepared, features: np.ndarray, scale: np.ndarray | None, num_patches: int) -> None:
        """A row with its features, flat, of all views."""
        folder = self.builder.folder
        row = item.row
        if item.split not in self._shards:
            path = folder / item.split / f"data-{self.number:05d}.arrow"
            self._shards[item.split] = ShardWriter(path, self.builder.columns)
        if self._index is None:
            self._index = ShardWriter(folder / "index" / f"{self.number:05d}.arrow", self.builder.index_columns)
        record = {
            "id": row.id,
            "image_hash": item.image_hash,
            "num_patches": num_patches,
            "width": row.width,
            "height": row.height,
            "prompts": item.prompts,
            "answers": item.answers,
            "patch_features": features,
        }
        if "messages" in self.builder.columns:
            record["messages"] = json.dumps(row.messages) if row.messages else None
        if scale is not None:
            record["scale"] = scale
        self._shards[item.split].add(record)
        entry = {
            "id": row.id,
            "split": item.split,
            "image_hash": item.image_hash,
            "phash": item.phash,
            "prompts": row.prompts,
            "answers": row.answers,
            "thumb": item.thumb.reshape(-1),
        }
        if item.scores is not None:
            entry["scores"] = item.scores
        self._index.add(entry)

    def finish(self) -> list[Path]:
        """Makes the unit's files exist and marks it. Gives the files that the disk has to be waited for."""
        try:
            shards = {split: writer.finish(synced=False) for split, writer in sorted(self._shards.items())}
            index = self._index.finish(synced=False) if self._index else None
            record = {
                "unit": self.number,
                "rows": self.rows,
                "texts": self.texts,
                "shards": shards,
                "index": index,
                "rejected": self.rejected,
            }
            write_atomically(self.builder.unit_path(self.number), as_json(record), flush=False)
        except OSError:
            self.abandon()
            raise
        return [*self.builder.unit_files(record), self.builder.unit_path(self.number)]

    def abandon(self) -> None:
        for writer in [*self._shards.values(), *([self._index] if self._index else [])]:
            writer.abandon()


class CacheBuilder:
    """A cache folder that is being written.

    Args:
        folder: the cache.
        fingerprint: what decides its content; a folder begun with another one is refused.
        dtype, values, tokens: storage type, and lengths of a row's features and scales where all are equal.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: dict[str, Any],
        *,
        dtype: str,
        values: int | None,
        tokens: int | None,
        hidden_size: int,
        messages: bool,
        rows_per_unit: int,
        near_duplicates: str = "drop",
        scores: bool = False,
    ):
        self.folder, self.fingerprint = folder, fingerprint
        self.dtype, self.hidden_size, self.rows_per_unit = dtype, hidden_size, rows_per_unit
        self.near_duplicates = near_duplicates
        self.columns = feature_columns(dtype, values, tokens, messages)
        self.index_columns = INDEX_COLUMNS
        if scores:
            self.index_columns = datasets.Features(
                INDEX_COLUMNS | {"scores": datasets.List(datasets.Value("float32"))}
            )
        self._finisher = ThreadPoolExecutor(1)
        self._finishing: Future[None] | None = None

    def start(self) -> None:
        """Takes the folder: empty, or begun with the same fingerprint. Removes what a killed process left unfinished."""
        begun = self.folder / "units" / "fingerprint.json"
        others = [path.name for path in self.folder.iterdir() if path.name != ".lock"]
        if begun.exists():
            refuse_difference(json.loads(begun.read_text()), self.fingerprint, self.folder)
        elif others:
            raise UserError(f"{self.folder} is not empty and is no feature cache (it holds {sorted(others)[0]})")
        else:
            begun.parent.mkdir(parents=True)
            write_atomically(begun, as_json(self.fingerprint))
        for path in self.folder.rglob("*.tmp"):
            path.unlink()
        self._check_newest()

    def unit_path(self, number: int) -> Path:
        return self.folder / "units" / f"{number:05d}.json"

    def is_done(self, number: int) -> bool:
        return self.unit_path(number).exists()

    def done_units(self) -> list[int]:
        return sorted(int(path.stem) for path in (self.folder / "units").glob("[0-9]*.json"))

    def unit_files(self, record: dict[str, Any]) -> list[Path]:
        """The Arrow files of a unit."""
        files = [self.folder / split / shard["file"] for split, shard in record["shards"].items()]
        return files + ([self.folder / "index" / record["index"]["file"]] if record["index"] else [])

    def finish(self, unit: UnitWriter) -> None:
        """Marks a unit, and waits for the disk in the background, while the encoder goes on."""
        self.wait()
        files = unit.finish()
        self._finishing = self._finisher.submit(self._flush_to_disk, files)

    def _flush_to_disk(self, files: list[Path]) -> None:
        """Flush the files of a unit. If that fails, the unit is unmarked and removed."""
        try:
            for path in files:
                flush_to_disk(path)
                if path.suffix == ".arrow":
                    flush_to_disk(path.with_name(path.name + ".sums"))
            for folder in {path.parent for path in files}:
                flush_to_disk(folder)
        except OSError:  # the disk could not take what it had accepted
            for path in reversed(files):  # the mark first
                path.unlink(missing_ok=True)
                path.with_name(path.name + ".sums").unlink(missing_ok=True)
            raise

    def wait(self) -> None:
        """Raises what the disk raised in the background."""
        if self._finishing is not None:
            pending, self._finishing = self._finishing, None
            pending.result()

    def _check_newest(self) -> None:
        """Unmarks units that a power cut left damaged: only the newest two can be."""
        for number in sorted(self.done_units(), key=lambda n: self.unit_path(n).stat().st_mtime_ns)[-2:]:
            try:
                record = json.loads(self.unit_path(number).read_text())
                shards = [*record["shards"].values(), *([record["index"]] if record["index"] else [])]
                sound = all(
                    file_checksum(path) == shard["xxh3_128"] and path.with_name(path.name + ".sums").exists()
                    for path, shard in zip(self.unit_files(record), shards)
                )
            except (ValueError, KeyError, FileNotFoundError):
                sound = False
            if not sound:
                print(f"unit {number} was not completely on the disk: it is embedded again")
                self.unit_path(number).unlink()

    def close(self) -> None:
        self._finisher.shutdown(wait=True)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _records(self) -> Iterator[dict[str, Any]]:
        for number in self.done_units():
            yield json.loads(self.unit_path(number).read_text())

    def _index(self, record: dict[str, Any]) -> dict[str, np.ndarray]:
        table = datasets.Dataset.from_file(str(self.folder / "index" / record["index"]["file"])).data.table
        thumbs = table.column("thumb").combine_chunks()
        flat = thumbs.flatten().to_numpy(zero_copy_only=False)
        return {
            "id": np.array(table.column("id").to_pylist(), dtype=object),
            "split": np.array(table.column("split").to_pylist(), dtype=object),
            "image_hash": np.array(table.column("image_hash").to_pylist(), dtype=object),
            "phash": table.column("phash").to_numpy(),
            "thumb": flat.reshape(-1, THUMB, THUMB, 3),
        }

    def _find_duplicates(self) -> tuple[dict[int, dict[int, tuple[str, str]]], dict[str, int]]:
        """Rows to take out: `{unit: {row of its index: (reason, value)}}`, and counts of what was found."""
        seen: set[int] = set()
        out: dict[int, dict[int, tuple[str, str]]] = {}
        held: dict[str, list[Any]] = {"id": [], "split": [], "image_hash": [], "phash": [], "thumb": []}
        images: dict[str, set[int]] = {split: set() for split in SPLITS}
        repeated = 0
        for record in self._records():
            if not record["index"]:
                continue
            index = self._index(record)
            for place, row_id in enumerate(index["id"]):
                key = xxhash.xxh3_64_intdigest(row_id.encode())
                if key in seen:
                    out.setdefault(record["unit"], {})[place] = ("duplicate_id", f"another row has the id {row_id}")
                seen.add(key)
                image = int(index["image_hash"][place][:16], 16)
                repeated += image in images[index["split"][place]]
                images[index["split"][place]].add(image)
            evaluation = index["split"] != "train"
            for name, values in held.items():
                values.append(index[name][evaluation])
        counts = {
            "duplicate_ids": sum(map(len, out.values())),
            "same_image_within_a_split": repeated,
            "same_image_in_validation_and_test": len(images["validation"] & images["test"]),
            "same_image_in_training_and_evaluation": 0,
            "near_duplicates_in_training_and_evaluation": 0,
            "near_duplicates_in_validation_and_test": 0,
        }
        joined = {name: np.concatenate(values) for name, values in held.items()} if held["id"] else {}
        if not joined or not len(joined["id"]):
            return out, counts
        known = {image: number for number, image in reversed(list(enumerate(joined["image_hash"])))}
        near = NearIndex(joined["phash"], joined["thumb"])
        validation = joined["split"] == "validation"
        between = NearIndex(joined["phash"][~validation], joined["thumb"][~validation])
        found = between.find(joined["phash"][validation], joined["thumb"][validation])
        counts["near_duplicates_in_validation_and_test"] = len(found)
        for record in self._records():
            if not record["index"]:
                continue
            index = self._index(record)
            train = np.flatnonzero(index["split"] == "train")
            close = near.find(index["phash"][train], index["thumb"][train])
            for number, place in enumerate(train.tolist()):
                twin = known.get(index["image_hash"][place])
                reason = "same_image"
                if twin is None:
                    twin, reason = close.get(number), "near_duplicate"
                if twin is None:
                    continue
                long = "same_image" if reason == "same_image" else "near_duplicates"
                counts[f"{long}_in_training_and_evaluation"] += 1
                if self.near_duplicates == "drop":
                    value = f"{joined['split'][twin]} image {joined['id'][twin]}"
                    out.setdefault(record["unit"], {}).setdefault(place, (reason, value))
        return out, counts

    def _take_out(self, record: dict[str, Any], rows: dict[int, tuple[str, str]]) -> dict[str, Any]:
        """Rewrites a unit's shards without some rows; the old shards stay until the new mark stands."""
        index = self._index(record)
        places: dict[str, set[int]] = {}
        counters = dict.fromkeys(SPLITS, 0)
        for place, split in enumerate(index["split"]):
            if place in rows:
                places.setdefault(split, set()).add(counters[split])
                reason, value = rows[place]
                line = {"kind": "row", "id": index["id"][place], "unit": record["unit"], "reason": reason}
                record["rejected"].append(line | {"value": value})
            counters[split] += 1
        for split, gone in places.items():
            old = self.folder / split / record["shards"][split]["file"]
            writer = ShardWriter(old.with_name(f"data-{record['unit']:05d}-kept.arrow"), self.columns)
            for number, row in enumerate(iter_rows(old)):
                if number not in gone:
                    writer.add(row)
            if writer.rows:
                record["shards"][split] = writer.finish()
            else:
                writer.abandon()
                del record["shards"][split]
        record["taken_out"] = sorted(rows)
        write_atomically(self.unit_path(record["unit"]), as_json(record))
        return record

    def finalize(self, described: dict[str, Any]) -> dict[str, Any]:
        """Takes duplicates out and writes the small files, `cache.json` last. Can be repeated after a kill."""
        self.wait()
        started = time.time()
        duplicates, duplicate_counts = self._find_duplicates()
        shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        rows = {split: 0 for split in SPLITS}
        reasons: dict[str, dict[str, int]] = {"row": {}, "text": {}}
        total_rows = total_texts = rejected_rows = 0
        units, lines = [], []
        for record in self._records():
            gone = duplicates.get(record["unit"], {})
            if gone and record.get("taken_out") is None:
                record = self._take_out(record, gone)
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
            if not shards[split]:  # an empty split is a split too
                shards[split].append(ShardWriter(self.folder / split / "data-empty.arrow", self.columns).finish())
            keep = {shard["file"] for shard in shards[split]}
            for path in (self.folder / split).glob("data-*"):
                if path.name.removesuffix(".sums") not in keep:
                    path.unlink()
        cached = sum(rows.values())
        if cached + rejected_rows != total_rows:
            raise RuntimeError(f"{total_rows} rows went in, {cached} cached and {rejected_rows} rejected came out")
        rejected = "".join(line + "\n" for line in lines).encode()
        write_atomically(self.folder / "rejected.jsonl", rejected)
        content = hashlib.sha256(rejected)
        for split in SPLITS:
            for shard in shards[split]:
                content.update(f"{split}/{shard['file']}:{shard['xxh3_128']}".encode())
        cache = {
            "format": FORMAT,
            "content_hash": content.hexdigest(),
            "fingerprint": self.fingerprint,
            "counts": {
                "rows": total_rows,
                "cached": cached,
                "rejected": rejected_rows,
                **rows,
                "texts": total_texts,
                "rejected_by_reason": reasons,
                "duplicates": duplicate_counts,
            },
            "columns": list(self.columns),
            "dtype": self.dtype,
            "hidden_size": self.hidden_size,
            **described,
            "bytes": sum(shard["bytes"] for split in SPLITS for shard in shards[split]),
            "shards": shards,
            "index": units,
            "versions": library_versions(),
        }
        names = {split: [shard["file"] for shard in shards[split]] for split in SPLITS}
        write_dataset_files(self.folder, self.columns, names, cache["content_hash"])
        cache["finalize_seconds"] = round(time.time() - started, 2)
        write_atomically(self.folder / "cache.json", as_json(cache))
        return cache
