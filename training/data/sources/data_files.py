"""Parquet, Arrow and tar files: where they are, how many rows they hold, readers that start at any row."""

from __future__ import annotations

import glob
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blipren.training.data.sources.images import is_link_out_of
from blipren.training.errors import UserError


def files_of(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and of the folders in it."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.exists():
                yield path


def check_readable(files: Iterable[Path], root: Path, follow_links: bool) -> None:
    """Check files that libraries open by themselves.

    Raises:
        UserError: one is a pipe, socket or device, which would be waited for, or a link out of the folder `root`.
    """
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is no regular file; take it out of the data set")
        if not follow_links and is_link_out_of(file, [str(root)]):
            raise UserError(f"{file} is a link out of the folder; give --follow-links to read it")


@dataclass
class Files:
    """Parquet, Arrow or tar files of each split in reading order, for readers that start at any row."""

    reader: str
    splits: list[list[str]]
    storage_options: dict[str, Any] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def rows_of(self, file: str) -> int:
        """Return the number of rows of a file, from the footer of a Parquet file or the headers of a tar."""
        if file not in self._counts:
            import fsspec

            with fsspec.open(file, "rb", **self.storage_options) as stream:
                if self.reader == "parquet":
                    import pyarrow.parquet

                    self._counts[file] = pyarrow.parquet.ParquetFile(stream).metadata.num_rows
                elif self.reader == "webdataset":
                    keys = [
                        member.name.rpartition("/")[2].partition(".")[0] for member in tarfile.open(fileobj=stream)
                    ]
                    self._counts[file] = sum(a != b for a, b in zip([None, *keys], keys))
                else:
                    import pyarrow as pa

                    self._counts[file] = sum(batch.num_rows for batch in pa.ipc.open_stream(stream))
        return self._counts[file]

    def count(self) -> int:
        """Return the number of rows of all files."""
        return sum(self.rows_of(file) for files in self.splits for file in files)

    def skip_to(self, data: Any, split: int, start: int) -> tuple[Any, int]:
        """Return the stream of a split without the files before row `start`, and the number of rows still to skip.

        The stream is None where no file is left.
        """
        import datasets

        left = list(self.splits[split])
        while left and start >= self.rows_of(left[0]):
            start -= self.rows_of(left.pop(0))
        if not left:
            return None, start
        if len(left) == len(self.splits[split]):
            return data, start
        fresh = datasets.load_dataset(
            self.reader, data_files={"train": left}, streaming=True, storage_options=self.storage_options or None
        )["train"]
        features = data.features
        if fresh.features is None:
            fresh = fresh._resolve_features()
        fresh = fresh.select_columns(list(features))
        for column, kind in features.items():
            if fresh.features[column] != kind:  # images that are left undecoded
                fresh = fresh.cast_column(column, kind)
        return fresh, start


def find_data_files(path: str) -> tuple[str, dict[str, list[str]], str | None, list[str]] | None:
    """Find the Parquet, Arrow or tar files that `path` is or holds.

    Args:
        path: a folder, a file or a pattern, also on a file system that fsspec knows (`s3://...`).

    Returns:
        Name of the reader, files of each split, root folder, names with sizes; None where there are no such files.

    Raises:
        UserError: the files are of another kind, or a file system has none.
    """
    import fsspec
    from datasets.data_files import DataFilesDict, get_data_patterns

    readers = {".tar": "webdataset", ".parquet": "parquet", ".arrow": "arrow"}
    if "://" in path and not path.startswith("hf://"):
        fs, inner = fsspec.core.url_to_fs(path)
        found = sorted(fs.glob(inner) if glob.has_magic(inner) else fs.find(inner))
        for suffix, reader in readers.items():
            chosen = [name for name in found if name.endswith(suffix)]
            if chosen:
                sizes = [f"{name.rpartition('/')[2]}:{fs.size(name)}" for name in chosen]
                return reader, {"train": [fs.unstrip_protocol(name) for name in chosen]}, None, sizes
        raise UserError(f"{path}: no .parquet, .tar or .arrow files there")
    local = Path(path)
    if local.is_dir():
        for suffix, reader in readers.items():  # tars first: img2dataset puts a Parquet of its log beside each
            if any(file.suffix == suffix for file in files_of(local)):
                base = local.resolve().as_posix()
                patterns = get_data_patterns(base)
                data = DataFilesDict.from_patterns(patterns, base_path=base, allowed_extensions=[suffix])
                files = {str(split): list(map(str, names)) for split, names in data.items()}
                return reader, files, base, _names_and_sizes(files, base)
        return None
    names = [path] if local.is_file() else sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []
    if not names:
        return None
    reader = readers.get(Path(names[0]).suffix)
    if reader is None:
        raise UserError(f"{path}: give a folder, or .parquet, .tar, .arrow, .jsonl, .json or .csv files")
    root = os.path.dirname(os.path.abspath(names[0]))
    files = {"train": [os.path.abspath(name) for name in names]}
    return reader, files, root, _names_and_sizes(files, root)


def _names_and_sizes(files: dict[str, list[str]], root: str) -> list[str]:
    return [f"{s}:{os.path.relpath(name, root)}:{os.path.getsize(name)}" for s in files for name in files[s]]
