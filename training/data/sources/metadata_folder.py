"""Folders of images with a metadata file.

They are read row by row here, because `datasets` refuses the whole folder for one bad path in it.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from blipren.training.arguments import METADATA_FILES
from blipren.training.data.sources.columns import VIDEO_SUFFIXES, find_columns, get, read_texts
from blipren.training.data.sources.data_files import files_of
from blipren.training.data.sources.images import Folder
from blipren.training.data.sources.kept_columns import infer_features
from blipren.training.data.sources.rows import Row, Source, hash_texts, make_row, parse_record
from blipren.training.data.sources.splits import normalize_split
from blipren.training.errors import UserError


class MetadataFolder(Source):
    """A folder of images with `metadata.jsonl`, `.csv` or `.parquet`, in it or in a folder for each split.

    Lines that name the same image file are one row with all their texts. Broken lines are rejected rows.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[Path],
        options: dict[str, Any],
        follow_links: bool = False,
        keep_columns: bool = False,
    ):
        self.name = str(folder)
        self.folder, self.follow_links = folder, follow_links
        self.merged_rows = 0
        self._entries: list[tuple[int, list[bytes]]] = []  # (file number, JSON of each line of one image)
        self._splits: list[str | None] = []
        self._roots: list[Path] = []
        names: dict[str, None] = {}
        place: dict[tuple[int, str], int] = {}
        raw: list[tuple[int, bytes]] = []
        for number, file in enumerate(files):
            own = normalize_split(file.parent.name) if file.parent != folder else None
            own = own or (normalize_split(file.stem) if file.name not in METADATA_FILES else None)
            self._splits.append(own)
            self._roots.append(file.parent)
            raw += [(number, line) for line in _metadata_lines(file)]
        records = []
        for _, line in raw:
            record = parse_record(line)
            records.append(record)
            if record:
                names.update(dict.fromkeys(record))
        self.columns = find_columns(list(names), _nested_keys(records), dataset=self.name, **options)
        named = next((name for r in records if r and isinstance(name := get(r, self.columns.image), str)), "")
        self.columns.video = self.columns.video or named.lower().endswith(VIDEO_SUFFIXES)
        if keep_columns:
            self.features = infer_features(records)
        for (number, line), record in zip(raw, records):
            key = get(record, self.columns.image) if record else None
            merged = self.columns.conversation is None  # conversations about an image stay rows of their own
            if merged and isinstance(key, str) and (number, key) in place:
                self._entries[place[number, key]][1].append(line)
                self.merged_rows += 1
                continue
            if isinstance(key, str):
                place[number, key] = len(self._entries)
            self._entries.append((number, [line]))
        if self.columns.conversation:
            self._roots = [_folder_of_images(root, records, self.columns.image) for root in self._roots]
        self.num_rows = len(self._entries)
        sizes = (f"{path.relative_to(folder)}:{path.stat().st_size}" for path in sorted(files_of(folder)))
        self.fingerprint = hash_texts([hashlib.sha256(line).hexdigest() for _, line in raw] + sorted(sizes))
        if not self.num_rows:
            raise UserError(f"{self.name}: its metadata has no rows")

    def rows(self, start: int = 0) -> Iterator[Row]:
        for index in range(start, len(self._entries)):
            number, lines = self._entries[index]
            folder = Folder(root=str(self._roots[number]), link_root=str(self.folder), follow_links=self.follow_links)
            parsed = [parse_record(line) for line in lines]
            if parsed[0] is None:
                text = lines[0][:200].decode("utf-8", "replace")
                yield Row(id=f"line-{index}", index=index, image=None, rejected=("metadata_line", text))
                continue
            row = make_row(parsed[0], self.columns, index, f"row-{index:09d}", folder)
            if self.features is not None:
                row.record = parsed[0]
            if self.columns.id == self.columns.image and self._roots[number] != self.folder:
                row.id = str(self._roots[number].relative_to(self.folder) / row.id)
            if row.record is not None:
                row.merged_records = parsed[1:]
            for record in parsed[1:]:
                prompts, answers, problems = read_texts(record, self.columns)
                row.prompts += prompts
                row.answers += answers
                row.problems += problems
            row.split = row.split or self._splits[number]
            yield row


def _folder_of_images(root: Path, records: Iterable[dict[str, Any] | None], column: str) -> Path:
    """Return the folder that holds the images of a file of conversations: its own, or one in it.

    LLaVA's files name an image without the folder that it lies in.
    """
    named = (get(record, column) for record in records if record)
    first = next((name[0] if isinstance(name, list) and name else name for name in named if name), None)
    if not isinstance(first, str) or (root / first).exists():
        return root
    return next((child for child in sorted(root.iterdir()) if (child / first).is_file()), root)


def _metadata_lines(file: Path) -> Iterator[bytes]:
    """Yield each row of a metadata file as JSON."""
    if file.suffix == ".csv":
        with open(file, newline="", encoding="utf-8-sig") as stream:
            for record in csv.DictReader(stream):
                yield json.dumps({key: value for key, value in record.items() if key is not None}).encode()
    elif file.suffix == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for record in batch.to_pylist():
                yield json.dumps(record, default=str).encode()
    elif file.suffix == ".json":
        try:
            records = json.loads(file.read_bytes())
        except ValueError as error:
            raise UserError(f"{file} is no JSON: {error}") from error
        if not isinstance(records, list):
            raise UserError(
                f"{file} holds {type(records).__name__}; a list of objects is read, or JSON lines (.jsonl)"
            )
        for record in records:
            yield json.dumps(record).encode()
    else:
        with open(file, "rb") as stream:
            for line in stream:
                if line.strip():
                    yield line.strip()


def _nested_keys(records: Iterable[dict[str, Any] | None]) -> dict[str, set[str]]:
    """Return the keys inside of each column that holds objects."""
    found: dict[str, set[str]] = {}
    for record in records:
        for name, value in (record or {}).items():
            if isinstance(value, dict):
                found.setdefault(name, set()).update(value)
    return found
