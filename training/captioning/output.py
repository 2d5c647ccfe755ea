"""The captioned data set: Parquet shards, WebDataset tars, or metadata.jsonl beside the pictures, written unit by unit."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from blipren.training.data.cache.fingerprints import check_same_fingerprint
from blipren.training.data.cache.shards import as_json, file_checksum
from blipren.training.data.cache.writer.unit_folder import UnitFolder
from blipren.training.data.sources.kept_columns import as_text
from blipren.training.data.sources.rows import Row
from blipren.training.errors import UserError
from blipren.training.files import write_atomically

FORMAT = 1
ROW_GROUP = 100  # rows of a Parquet row group: readers of images take one at a time
CARD = """---
configs:
- config_name: default
  data_files:
{files}---

Captions by `{model}`: {captioned:,} rows, {rejected:,} rejected (see rejected.jsonl). Figures are in captions.json.
"""


class ParquetFile:
    """Parquet file of one split in a unit, with the types of `datasets` in its schema."""

    suffix = "parquet"

    def __init__(self, path: Path, features: datasets.Features):
        self.path, self.features = path, features
        self._writer = pq.ParquetWriter(path, features.arrow_schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def add(self, key: str, record: dict[str, Any], image: bytes | None, text: str) -> None:
        self._rows.append(self.features.encode_example(record))
        if len(self._rows) == ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self.features.arrow_schema))
            self._rows = []

    def close(self) -> None:
        self._flush()
        self._writer.close()


class TarFile:
    """WebDataset tar: `KEY.jpg` where images are kept, `KEY.txt` with the first caption, `KEY.json` with all columns."""

    suffix = "tar"

    def __init__(self, path: Path, features: datasets.Features):
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)

    def add(self, key: str, record: dict[str, Any], image: bytes | None, text: str) -> None:
        columns = json.dumps(json_values(record), ensure_ascii=False, default=str)
        members = {"txt": text.encode(), "json": columns.encode()}
        if image is not None:
            members = {image_suffix(image): image} | members
        for suffix, data in members.items():
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))

    def close(self) -> None:
        self._tar.close()


class LinesFile:
    """Lines of metadata.jsonl."""

    suffix = "jsonl"

    def __init__(self, path: Path, features: datasets.Features):
        self._file = path.open("w", encoding="utf-8")

    def add(self, key: str, record: dict[str, Any], image: bytes | None, text: str) -> None:
        self._file.write(json.dumps(json_values(record), ensure_ascii=False, default=str) + "\n")

    def close(self) -> None:
        self._file.close()


WRITERS = {"parquet": ParquetFile, "webdataset": TarFile, "metadata": LinesFile}


def json_values(record: dict[str, Any]) -> dict[str, Any]:
    """Return the columns that JSON can hold: those without bytes."""

    def holds_bytes(value: Any) -> bool:
        if isinstance(value, dict):
            return any(map(holds_bytes, value.values()))
        return isinstance(value, bytes) or (isinstance(value, list) and any(map(holds_bytes, value)))

    return {name: value for name, value in record.items() if not holds_bytes(value)}


def image_suffix(data: bytes) -> str:
    """Return the usual end of the name of an image file, by its bytes."""
    kind = (Image.open(io.BytesIO(data)).format or "png").lower()
    return {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}.get(kind, kind)


def encoded(image: bytes | Image.Image) -> bytes:
    """Return the bytes of an image; pixels become a PNG."""
    if isinstance(image, bytes):
        return image
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


class CaptionUnit:
    """The files of one unit, one a split. `finish` marks it as done."""

    def __init__(self, out: CaptionFolder, number: int):
        self.out, self.number = out, number
        self.rows = self.captioned = 0
        self.rejected: list[dict[str, Any]] = []
        self._files: dict[str, Any] = {}

    def _path(self, split: str) -> Path:
        return self.out.folder / self.out.file_name(split, self.number)

    def add(self, split: str | None, key: str, record: dict[str, Any], image: bytes | None, text: str) -> None:
        """Add a row: its columns, its encoded image where images are kept, and its first caption."""
        split = split or "train"
        if split not in self._files:
            path = self._path(split)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files[split] = self.out.writer(path.with_name(path.name + ".tmp"), self.out.features)
        self._files[split].add(key, record, image, text)
        self.captioned += 1

    def finish(self) -> list[Path]:
        """Rename the files and mark the unit as done. Returns what is still to be flushed to the disk."""
        files = []
        for split, file in sorted(self._files.items()):
            file.close()
            path = self._path(split)
            path.with_name(path.name + ".tmp").replace(path)
            name = path.relative_to(self.out.folder).as_posix()
            files.append({"split": split, "file": name, "xxh3_128": file_checksum(path)})
        record = {
            "unit": self.number,
            "rows": self.rows,
            "captioned": self.captioned,
            "files": files,
            "rejected": self.rejected,
        }
        write_atomically(self.out.unit_path(self.number), as_json(record), flush=False)
        return [*self.out.unit_files(record), self.out.unit_path(self.number)]

    def abandon(self) -> None:
        """Remove the files of the unit."""
        for split, file in self._files.items():
            with contextlib.suppress(OSError, pa.ArrowException):  # of a full disk, which is reported already
                file.close()
            path = self._path(split)
            path.with_name(path.name + ".tmp").unlink(missing_ok=True)


class CaptionFolder(UnitFolder):
    """A captioned data set that is being written. With metadata.jsonl the units lie in a hidden folder of OUT.

    Args:
        out: the data set. form: `parquet`, `webdataset` or `metadata`. features: types of all columns.
    """

    kind = "captioned data set"
    marks = ".units"

    def __init__(self, out: Path, fingerprint: dict[str, Any], rows_per_unit: int, form: str, features):
        super().__init__(out / ".captions" if form == "metadata" else out, fingerprint, rows_per_unit)
        self.out, self.form, self.features, self.writer = out, form, features, WRITERS[form]
        self.folder.mkdir(parents=True, exist_ok=True)

    def file_name(self, split: str, number: int) -> str:
        return f"{'' if self.form == 'metadata' else 'data/'}{split}-{number:05d}.{self.writer.suffix}"

    def unit_files(self, record: dict[str, Any]) -> list[Path]:
        return [self.folder / file["file"] for file in record["files"]]

    def file_records(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        return record["files"]

    def is_complete(self) -> bool:
        """Return whether the data set is finished, and remove what a kill at its very end has left.

        Raises:
            UserError: it was made with other settings.
        """
        path = self.out / "captions.json"
        if not path.exists():
            return False
        check_same_fingerprint(json.loads(path.read_text())["fingerprint"], self.fingerprint, self.out)
        self._remove_marks()
        return True

    def _remove_marks(self) -> None:
        shutil.rmtree(self.folder if self.form == "metadata" else self.folder / self.marks, ignore_errors=True)

    def put_image(self, name: str | None, index: int, image: bytes) -> str:
        """Write a picture beside metadata.jsonl, and return its name: its own, or its number where that is taken."""
        numbered = f"images/{index:09d}.{image_suffix(image)}"
        for chosen in (name or numbered, numbered):
            path = self.out / chosen
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, image, flush=False)
                return chosen
            if path.read_bytes() == image:
                return chosen
        raise UserError(f"{self.out / numbered} is there and is another picture: choose another OUT")

    def complete(self, model: str, columns: list[str]) -> dict[str, Any]:
        """Write what belongs to all units, captions.json last. It can be repeated after a kill. Returns captions.json.

        Raises:
            UserError: no row has a caption.
        """
        self.wait()
        counts = {"rows": 0, "captioned": 0, "rejected": 0}
        splits: dict[str, int] = {}
        reasons: dict[str, int] = {}
        lines, files = [], []
        for record in self.records():
            counts["rows"] += record["rows"]
            counts["captioned"] += record["captioned"]
            counts["rejected"] += len(record["rejected"])
            lines += [json.dumps(line, ensure_ascii=False) + "\n" for line in record["rejected"]]
            for line in record["rejected"]:
                reasons[line["reason"]] = reasons.get(line["reason"], 0) + 1
            for file in record["files"]:
                splits[file["split"]] = splits.get(file["split"], 0) + 1
            files += record["files"]
        if counts["rows"] != counts["captioned"] + counts["rejected"]:
            raise RuntimeError(f"{counts}: rows went in that neither have a caption nor are rejected")
        write_atomically(self.out / "rejected.jsonl", "".join(lines))
        if self.form == "metadata":
            text = b"".join(path.read_bytes() for record in self.records() for path in self.unit_files(record))
            write_atomically(self.out / "metadata.jsonl", text)
        elif splits:
            listed = "".join(f"  - split: {s}\n    path: data/{s}-*.{self.writer.suffix}\n" for s in sorted(splits))
            write_atomically(self.out / "README.md", CARD.format(files=listed, model=model, **counts))
        info = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "counts": counts | {"rejected_by_reason": reasons},
            "columns": columns,
            "files": [] if self.form == "metadata" else files,
        }
        write_atomically(self.out / "captions.json", as_json(info))
        self._remove_marks()
        if not counts["captioned"]:
            raise UserError(f"no row got a caption; the reasons are in {self.out / 'rejected.jsonl'}")
        return info


def picture_name(row: Row) -> str | None:
    """Return the path of a row's picture file in its data set's folder; None where it is no file there."""
    if not isinstance(row.image, str) or row.folder.root is None:
        return None
    full = Path(os.path.normpath(Path(row.folder.root, row.image)))
    root = Path(row.folder.link_root or row.folder.root)
    return full.relative_to(root).as_posix() if full.is_relative_to(root) else None


def text_columns(record: dict[str, Any], features: datasets.Features) -> dict[str, Any]:
    """Return a record with all columns of the data set, as text where a column's types differ."""
    string = datasets.Value("string")
    return {name: as_text(record.get(name)) if kind == string else record.get(name) for name, kind in features.items()}
