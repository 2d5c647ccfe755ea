"""The units of a feature cache: shards (one a split) and an index each. See `unit_folder.py` for what a kill leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np

from blipren.training.data.cache.prepare import Prepared
from blipren.training.data.cache.shards import ShardWriter, as_json, feature_columns, iter_rows
from blipren.training.data.cache.writer.unit_folder import UnitFolder
from blipren.training.data.sources.near_duplicates import THUMB
from blipren.training.data.sources.splits import SPLITS
from blipren.training.files import write_atomically

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


class UnitWriter:
    """The shards (one a split) and the index of one unit. `finish` marks it as done."""

    def __init__(self, cache: CacheWriter, number: int):
        self.cache, self.number = cache, number
        self.rows = self.texts = 0
        self.rejected: list[dict[str, Any]] = []
        self._shards: dict[str, ShardWriter] = {}
        self._index: ShardWriter | None = None

    def add(self, item: Prepared, features: np.ndarray, scale: np.ndarray | None, num_patches: int) -> None:
        """Add a row with the flat features of all its views, and for int8 their scales."""
        folder = self.cache.folder
        row = item.row
        if item.split not in self._shards:
            path = folder / item.split / f"data-{self.number:05d}.arrow"
            self._shards[item.split] = ShardWriter(path, self.cache.columns)
        if self._index is None:
            self._index = ShardWriter(folder / "index" / f"{self.number:05d}.arrow", self.cache.index_columns)
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
        if "view_prompts" in self.cache.columns:
            record["view_prompts"] = [[prompt for prompt, _ in pairs] for pairs in item.places]
            record["view_answers"] = [[answer for _, answer in pairs] for pairs in item.places]
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
        """Rename the files of the unit and mark it as done. Returns the files that are still to be flushed to the disk."""
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
            write_atomically(self.cache.unit_path(self.number), as_json(record), flush=False)
        except OSError:
            self.abandon()
            raise
        return [*self.cache.unit_files(record), self.cache.unit_path(self.number)]

    def abandon(self) -> None:
        """Remove the files of the unit."""
        for writer in [*self._shards.values(), *([self._index] if self._index else [])]:
            writer.abandon()


class CacheWriter(UnitFolder):
    """A cache folder that is being written.

    Args:
        folder: the cache.
        fingerprint: what decides its content; a folder that was begun with another one is refused.
        dtype: type of the stored features.
        values, tokens: number of features and of scales of a row, where it is the same in all rows.
        scores: whether texts have similarities.
        view_texts: whether views have questions of their own.
    """

    kind = "feature cache"
    marks = "units"

    def __init__(
        self,
        folder: Path,
        fingerprint: dict[str, Any],
        *,
        dtype: str,
        values: int | None,
        tokens: int | None,
        hidden_size: int,
        rows_per_unit: int,
        near_duplicates: str = "drop",
        scores: bool = False,
        view_texts: bool = False,
    ):
        super().__init__(folder, fingerprint, rows_per_unit)
        self.dtype, self.hidden_size = dtype, hidden_size
        self.near_duplicates = near_duplicates
        self.columns = feature_columns(dtype, values, tokens, view_texts)
        self.index_columns = INDEX_COLUMNS
        if scores:
            self.index_columns = datasets.Features(
                INDEX_COLUMNS | {"scores": datasets.List(datasets.Value("float32"))}
            )

    def unit_files(self, record: dict[str, Any]) -> list[Path]:
        """Return the Arrow files of a unit."""
        files = [self.folder / split / shard["file"] for split, shard in record["shards"].items()]
        return files + ([self.folder / "index" / record["index"]["file"]] if record["index"] else [])

    def file_records(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        return [*record["shards"].values(), *([record["index"]] if record["index"] else [])]

    def companions(self, path: Path) -> list[Path]:
        """Return the checksums of a shard."""
        return [path.with_name(path.name + ".sums")] if path.suffix == ".arrow" else []

    def read_index(self, record: dict[str, Any]) -> dict[str, np.ndarray]:
        """Return id, split, image_hash, phash and thumb of the rows of a unit."""
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

    def remove_rows(self, record: dict[str, Any], rows: dict[int, tuple[str, str]]) -> dict[str, Any]:
        """Rewrite the shards of a unit without some rows. The old shards stay until the new record is written.

        Args:
            rows: place in the unit's index -> why: `(reason, value)`.
        """
        index = self.read_index(record)
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
