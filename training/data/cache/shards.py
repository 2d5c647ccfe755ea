"""Arrow shards of a feature cache: checksummed while they are written, renamed when complete, read memory-mapped.

A shard is an Arrow stream as `datasets` writes it. Beside `X.arrow` lies `X.arrow.sums`: an xxh3-64 of each megabyte,
so that a reader can check the part that it reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import xxhash

from blipren.training.errors import UserError
from blipren.training.files import flush_to_disk, write_atomically

BLOCK = 1 << 20  # bytes behind one checksum
FLUSH_BYTES = 32 << 20  # features of a record batch


class CacheDamage(UserError):
    """The bytes of a cache differ from those that were written."""


def feature_columns(dtype: str, values: int | None, tokens: int | None, view_texts: bool = False) -> datasets.Features:
    """Return the columns of a cache row. The features are last: the small columns lie together in a record batch.

    Args:
        values, tokens: number of features and of scales of a row; None where rows differ.
        view_texts: whether views have questions of their own.
    """
    columns: dict[str, Any] = {
        "id": datasets.Value("string"),
        "image_hash": datasets.Value("string"),
        "num_patches": datasets.Value("int32"),
        "width": datasets.Value("int32"),
        "height": datasets.Value("int32"),
        "prompts": datasets.List(datasets.Value("string")),
        "answers": datasets.List(datasets.Value("string")),
    }
    if view_texts:
        texts = datasets.List(datasets.List(datasets.Value("string")))
        columns |= {"view_prompts": texts, "view_answers": texts}
    if dtype == "int8":
        columns["scale"] = datasets.List(datasets.Value("float32"), length=-1 if tokens is None else tokens)
    columns["patch_features"] = datasets.List(datasets.Value(dtype), length=-1 if values is None else values)
    return datasets.Features(columns)


def list_array(rows: list[np.ndarray], kind: pa.DataType) -> pa.Array:
    """Make an Arrow list array of flat numpy arrays, one a row, without Python objects."""
    flat = np.concatenate([row.reshape(-1) for row in rows]) if rows else np.empty(0, np.float32)
    values = pa.array(flat, type=kind.value_type)
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(values, type=kind)
    offsets = np.concatenate([[0], np.cumsum([row.size for row in rows])])
    large = pa.types.is_large_list(kind)
    maker = pa.LargeListArray if large else pa.ListArray
    return maker.from_arrays(pa.array(offsets, type=pa.int64() if large else pa.int32()), values).cast(kind)


class _SummedFile:
    """A file that hashes what is written to it: all of it (xxh3-128) and each block (xxh3-64)."""

    def __init__(self, path: Path):
        self.file = open(path, "wb", buffering=0)  # unbuffered: a full disk is an error of this write, not of close
        self.whole = xxhash.xxh3_128()
        self.block = xxhash.xxh3_64()
        self.blocks: list[int] = []
        self.size = 0
        self.closed = False

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):
            written += self.file.write(view[written:])
        self.whole.update(view)
        done = 0
        while done < len(view):
            step = min(len(view) - done, BLOCK - self.size % BLOCK)
            self.block.update(view[done : done + step])
            done += step
            self.size += step
            if self.size % BLOCK == 0:
                self.blocks.append(self.block.intdigest())
                self.block = xxhash.xxh3_64()
        return len(view)

    def flush(self) -> None:
        pass

    def tell(self) -> int:
        return self.size

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.file.close()

    def finish(self) -> tuple[str, np.ndarray]:
        self.close()
        if self.size % BLOCK:
            self.blocks.append(self.block.intdigest())
        return self.whole.hexdigest(), np.array(self.blocks, dtype="<u8")


class ShardWriter:
    """Writer of one shard. The shard exists when `finish` has renamed it."""

    def __init__(self, path: Path, features: datasets.Features):
        self.path, self.features = path, features
        self.schema = features.arrow_schema
        self.rows = 0
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._apart = path.with_name(path.name + ".tmp")
        self._file = _SummedFile(self._apart)
        self._stream = pa.ipc.new_stream(pa.PythonFile(self._file, mode="w"), self.schema)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row of plain values; `patch_features` and `scale` are numpy arrays."""
        self._pending.append(row)
        self._pending_bytes += sum(value.nbytes for value in row.values() if isinstance(value, np.ndarray))
        self.rows += 1
        if self._pending_bytes >= FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        arrays = []
        for column in self.schema:
            values = [row[column.name] for row in self._pending]
            plain = not isinstance(values[0], np.ndarray)
            arrays.append(pa.array(values, type=column.type) if plain else list_array(values, column.type))
        self._stream.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self.schema))
        self._pending, self._pending_bytes = [], 0

    def finish(self, synced: bool = True) -> dict[str, Any]:
        """Close and rename the shard. Returns its record: file, rows, bytes, checksum.

        Args:
            synced: wait for the disk. A killed process loses nothing without it; a power cut may.
        """
        self._flush()
        self._stream.close()
        checksum, blocks = self._file.finish()
        if synced:
            flush_to_disk(self._apart)
        write_atomically(self.path.with_name(self.path.name + ".sums"), blocks.tobytes(), flush=synced)
        os.replace(self._apart, self.path)
        return {"file": self.path.name, "rows": self.rows, "bytes": self._file.size, "xxh3_128": checksum}

    def abandon(self) -> None:
        """Remove the shard, complete or not."""
        self._file.close()
        for path in (self._apart, self.path, self.path.with_name(self.path.name + ".sums")):
            path.unlink(missing_ok=True)


def write_table(path: Path, features: datasets.Features, arrays: list[pa.Array]) -> dict[str, Any]:
    """Write Arrow columns as a shard of one record batch. Returns its record."""
    writer = ShardWriter(path, features)
    columns = [array.cast(field.type) for array, field in zip(arrays, writer.schema, strict=True)]
    writer.rows = len(columns[0])
    writer._stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=writer.schema))
    return writer.finish()


class Shard:
    """A finished shard, memory-mapped. Bytes are checked against their checksums when they are first read."""

    def __init__(self, path: Path, record: dict[str, Any], verify: bool = True):
        self.path, self.rows = path, record["rows"]
        try:
            self._map = pa.memory_map(str(path))
            sums = np.fromfile(path.with_name(path.name + ".sums"), dtype="<u8")
        except FileNotFoundError as error:
            raise CacheDamage(f"{error.filename or path} is missing from the cache; embed it again") from error
        size = self._map.size()
        if size != record["bytes"] or len(sums) != -(-size // BLOCK):
            raise CacheDamage(f"{path} has {size:,} bytes where {record['bytes']:,} were written; embed it again")
        self._buffer = self._map.read_buffer()
        self._bytes = np.frombuffer(self._buffer, np.uint8)
        self._sums = sums
        self._checked = np.full(len(sums), not verify)
        self._check(0, min(size, 64 << 10))  # the schema, which Arrow parses
        self.table = self._open()
        # everything but the features is small (texts, ids, offsets) and checked now; features are checked row by row
        start = 0
        self._first: list[int] = [0]
        self._values: list[np.ndarray] = []
        self._offsets: list[np.ndarray | None] = []
        self._scales: list[tuple[np.ndarray, np.ndarray | None]] = []
        base = self._buffer.address
        spans = []
        for batch in self.table.to_batches():
            column = batch.column("patch_features")
            values, offsets = _flat(column)
            self._values.append(values)
            self._offsets.append(offsets)
            if "scale" in batch.schema.names:
                self._scales.append(_flat(batch.column("scale")))
            address = values.__array_interface__["data"][0] - base
            spans.append((start, address))
            start = address + values.nbytes
            self._first.append(self._first[-1] + batch.num_rows)
        spans.append((start, size))
        for low, high in spans:
            self._check(low, high)
        self.first = np.array(self._first)

    def _open(self) -> pa.Table:
        try:
            return pa.ipc.open_stream(pa.BufferReader(self._buffer)).read_all()
        except pa.ArrowInvalid as error:
            raise CacheDamage(f"{self.path} cannot be read ({error}); embed it again") from error

    def _check(self, low: int, high: int) -> None:
        """Check the blocks that hold the bytes `[low, high)`, each once. Raises `CacheDamage`."""
        for block in range(low // BLOCK, -(-high // BLOCK)):
            if not self._checked[block]:
                found = xxhash.xxh3_64_intdigest(self._bytes[block * BLOCK : (block + 1) * BLOCK])
                if found != int(self._sums[block]):
                    raise CacheDamage(
                        f"{self.path} is damaged: megabyte {block} is not what was written "
                        f"(checksum {found:016x}, not {int(self._sums[block]):016x}); delete the cache and embed again"
                    )
                self._checked[block] = True

    def check_all(self) -> None:
        """Check the whole file. Raises `CacheDamage`."""
        self._check(0, len(self._bytes))

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the stored features of a row, flat, and its scales or None, as checked views of the file."""
        batch = int(np.searchsorted(self.first, index, "right")) - 1
        place = index - int(self.first[batch])
        values = _slice(self._values[batch], self._offsets[batch], place)
        low = values.__array_interface__["data"][0] - self._buffer.address
        blocks = self._checked[low // BLOCK : -(-(low + values.nbytes) // BLOCK)]
        if not blocks.all():
            self._check(low, low + values.nbytes)
        return values, _slice(*self._scales[batch], place) if self._scales else None


def _flat(column: pa.Array) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the values of a list column as `[rows, length]`, or flat with offsets where lengths differ, uncopied."""
    if pa.types.is_fixed_size_list(column.type):
        values = column.flatten().to_numpy(zero_copy_only=True)
        return values.reshape(len(column), column.type.list_size), None
    values = column.values.to_numpy(zero_copy_only=True)
    return values, column.offsets.to_numpy(zero_copy_only=True)


def _slice(values: np.ndarray, offsets: np.ndarray | None, place: int) -> np.ndarray:
    return values[place] if offsets is None else values[offsets[place] : offsets[place + 1]]


def file_checksum(path: Path) -> str:
    """Return the xxh3-128 of a file, as `ShardWriter` computes it."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(8 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()


def write_dataset_files(
    folder: Path, features: datasets.Features, shards: dict[str, list[str]], key: str, dict_file: bool = True
) -> None:
    """Write the small files with which `datasets.load_from_disk(folder)` opens the shards of each split."""
    for split, files in shards.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        state = {
            "_data_files": [{"filename": name} for name in files],
            "_fingerprint": xxhash.xxh3_64_hexdigest(f"{key}/{split}".encode()),
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": split,
        }
        write_atomically(folder / split / "state.json", json.dumps(state, indent=1))
        content = {name: value for name, value in asdict(datasets.DatasetInfo(features=features)).items() if value}
        write_atomically(folder / split / "dataset_info.json", json.dumps(content, indent=1))
    if dict_file:
        write_atomically(folder / "dataset_dict.json", json.dumps({"splits": list(shards)}))


def as_json(content: Any) -> bytes:
    """Return JSON as the files of a cache hold it."""
    return (json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n").encode()


def iter_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a shard as plain values, features as numpy views, to rewrite it without some of them."""
    with pa.memory_map(str(path)) as source:
        for batch in pa.ipc.open_stream(source):
            lists = {
                name: _flat(batch.column(name)) for name in ("patch_features", "scale") if name in batch.schema.names
            }
            plain = batch.drop_columns(list(lists)).to_pylist()
            for place, row in enumerate(plain):
                yield row | {name: _slice(*parts, place) for name, parts in lists.items()}
