"""Rows from anything that `datasets.load_dataset` reads: `open_rows(DATASET)` gives image, prompts and answers.

A folder with metadata (jsonl, csv, parquet) is read row by row here, because the library gives the whole folder up for
one bad path in it; everything else (Hub ids, Parquet, WebDataset tars, folders saved by `save_to_disk`) goes through
`datasets`, with images undecoded. URLs are never fetched.
"""

from __future__ import annotations

import abc
import csv
import glob
import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from blipren.training.data.sources.columns import Columns, find_columns, get, read_messages, read_texts, texts
from blipren.training.data.sources.files import Files, files_of, find_data_files
from blipren.training.data.sources.images import Folder, ImageError, decode_image, image_bytes
from blipren.training.data.sources.splits import content_hash, normalize_split, split_by_hash
from blipren.training.errors import UserError

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass
class Row:
    """One image with its texts, undecoded. `prompts[i]` None: `answers[i]` answers the default caption prompt."""

    id: str
    index: int
    """Position in the reading order of the whole source."""
    image: Any
    """Bytes, a path, `{"bytes", "path"}` or a PIL image; `load` makes it RGB pixels."""
    folder: Folder = Folder()
    split: str | None = None
    """`train`, `validation`, `test`, or None where the image's hash decides."""
    prompts: list[str | None] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    messages: list[dict[str, Any]] | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)
    """Texts that could not be read: `(rule, value)`."""
    rejected: tuple[str, str] | None = None
    """Why the row as a whole cannot be used: `(reason, value)`; decided before the image is opened."""
    width: int | None = None
    """Pixels of the upright image, known after `load`."""
    height: int | None = None
    _data: bytes | Image.Image | None = field(default=None, repr=False)

    def data(self) -> bytes | Image.Image:
        """The undecoded image (read once). Raises `ImageError`."""
        if self._data is None:
            self._data = image_bytes(self.image, self.folder)
        return self._data

    def load(self) -> Image.Image:
        """The upright RGB image; sets `width` and `height`. Raises `ImageError`."""
        image = decode_image(self.data())
        self.width, self.height = image.size
        return image

    def image_hash(self) -> str:
        """32 hex digits of the image content, without decoding it. Raises `ImageError`."""
        return content_hash(self.data())


class Source(abc.ABC):
    """Rows in a fixed order. Iterate over it, or over `rows(start)` to go on where an earlier reader stopped."""

    name: str
    columns: Columns
    fingerprint: str
    num_rows: int | None = None

    @abc.abstractmethod
    def rows(self, start: int = 0) -> Iterator[Row]:
        """The rows from number `start` on."""

    def __iter__(self) -> Iterator[Row]:
        return self.rows()

    def count_rows(self) -> int:
        """Number of rows, counted where it is not known."""
        if self.num_rows is None:
            self.num_rows = sum(1 for _ in self.rows())
        return self.num_rows

    def describe(self) -> str:
        count = "streamed rows" if self.num_rows is None else f"{self.num_rows:,} rows"
        return f"{self.name}: {count}; columns {self.columns.describe()}"


def _sha(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:32]


def _make_row(record: dict[str, Any], columns: Columns, index: int, default_id: str, folder: Folder) -> Row:
    """A row from a record of columns; what is wrong with it is noted in the row, never raised."""
    prompts, answers, problems = read_texts(record, columns)
    row_id = get(record, columns.id) if columns.id else None
    if columns.id == "__key__" and record.get("__url__"):
        row_id = f"{Path(str(record['__url__'])).stem}/{row_id}"  # keys repeat from tar to tar
    row = Row(
        id=default_id if row_id is None or isinstance(row_id, (dict, list)) else str(row_id),
        index=index,
        image=next((v for choice in columns.image.split("/") if (v := get(record, choice)) is not None), None),
        folder=folder,
        prompts=prompts,
        answers=answers,
        messages=read_messages(get(record, columns.messages)) if columns.messages else None,
        problems=problems,
    )
    status = get(record, columns.status) if columns.status else None
    if isinstance(status, str) and status != "success":
        message = get(record, columns.status.replace("status", "error_message"))
        row.rejected = ("status", f"{status}: {message}" if message else status)
    if columns.split:
        value = get(record, columns.split)
        if value is not None:
            row.split = normalize_split(value)
            if row.split is None:
                row.rejected = row.rejected or ("unknown_split", str(value)[:200])
    return row


class MetadataFolder(Source):
    """A folder of images with `metadata.jsonl`, `.csv` or `.parquet`, there or in one folder a split.

    Rows that name the same file are one row with all their texts. Broken lines are rejected rows.
    """

    def __init__(self, folder: Path, files: Sequence[Path], options: dict[str, Any]):
        self.name = str(folder)
        self.folder = folder
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
            record = _parse(line)
            records.append(record)
            if record:
                names.update(dict.fromkeys(record))
        self.columns = find_columns(list(names), _nested_keys(records), dataset=self.name, **options)
        for (number, line), record in zip(raw, records):
            key = get(record, self.columns.image) if record else None
            if isinstance(key, str) and (number, key) in place:
                self._entries[place[number, key]][1].append(line)
                self.merged_rows += 1
                continue
            if isinstance(key, str):
                place[number, key] = len(self._entries)
            self._entries.append((number, [line]))
        self.num_rows = len(self._entries)
        sizes = (f"{path.relative_to(folder)}:{path.stat().st_size}" for path in sorted(files_of(folder)))
        self.fingerprint = _sha([hashlib.sha256(line).hexdigest() for _, line in raw] + sorted(sizes))
        if not self.num_rows:
            raise UserError(f"{self.name}: its metadata has no rows")

    def rows(self, start: int = 0) -> Iterator[Row]:
        for index in range(start, len(self._entries)):
            number, lines = self._entries[index]
            folder = Folder(root=str(self._roots[number]))
            parsed = [_parse(line) for line in lines]
            if parsed[0] is None:
                text = lines[0][:200].decode("utf-8", "replace")
                yield Row(id=f"line-{index}", index=index, image=None, rejected=("metadata_line", text))
                continue
            row = _make_row(parsed[0], self.columns, index, f"row-{index:09d}", folder)
            if self.columns.id == self.columns.image and self._roots[number] != self.folder:
                row.id = str(self._roots[number].relative_to(self.folder) / row.id)
            for record in parsed[1:]:
                prompts, answers, problems = read_texts(record, self.columns)
                row.prompts += prompts
                row.answers += answers
                row.problems += problems
            row.split = row.split or self._splits[number]
            yield row


def _metadata_lines(file: Path) -> Iterator[bytes]:
    """Each row of a metadata file as JSON bytes."""
    if file.suffix == ".csv":
        with open(file, newline="", encoding="utf-8-sig") as stream:
            for record in csv.DictReader(stream):
                yield json.dumps({key: value for key, value in record.items() if key is not None}).encode()
    elif file.suffix == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for record in batch.to_pylist():
                yield json.dumps(record, default=str).encode()
    else:
        with open(file, "rb") as stream:
            for line in stream:
                if line.strip():
                    yield line.strip()


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _nested_keys(records: Iterable[dict[str, Any] | None]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for record in records:
        for name, value in (record or {}).items():
            if isinstance(value, dict):
                found.setdefault(name, set()).update(value)
    return found


class HuggingFaceSource(Source):
    """Splits of `datasets` (map-style or streamed), images undecoded."""

    def __init__(
        self,
        name: str,
        splits: dict[str, Any],
        folder: Folder,
        fingerprint: str,
        options: dict[str, Any],
        files: Files | None = None,
    ):
        import datasets

        self.files = files

        self.name = name
        self.folder = folder
        self.fingerprint = fingerprint
        self._names: dict[str, dict[int, str]] = {}
        first = next(iter(splits.values()))
        if isinstance(first, datasets.IterableDataset) and first.features is None:
            splits = {split: data._resolve_features() for split, data in splits.items()}
            first = next(iter(splits.values()))
        features = first.features or {}
        nested = {column: kind.keys() for column, kind in features.items() if isinstance(kind, dict)}
        for column in features:  # `json` of a WebDataset is an object without declared keys, or a text
            if column == "json" and column not in nested:
                value = next(iter(first.select_columns([column])), {}).get(column)
                value = _parse(value) if isinstance(value, (bytes, str)) else value
                nested[column] = value.keys() if isinstance(value, dict) else ()
        images = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
        self.columns = find_columns(list(features), nested, dataset=name, image_features=images, **options)
        keep = [column for column in features if column in self.columns.wanted() | {"__key__", "__url__"}]
        self._splits: list[tuple[str | None, Any]] = []
        own = [normalize_split(split.split("[")[0]) for split in splits]
        if len(splits) > 1 and None in own:
            unknown = list(splits)[own.index(None)]
            raise UserError(f"{name}: split {unknown!r} is none of train, validation, test; choose by a split column")
        single_train = len(splits) == 1 and own[0] in ("train", None)
        for split, data in splits.items():
            data = data.select_columns(keep)
            for column in keep:
                kind = features[column]
                if isinstance(kind, datasets.Image):
                    data = data.cast_column(column, datasets.Image(decode=False))
                elif isinstance(kind, datasets.ClassLabel):
                    self._names[column] = dict(enumerate(kind.names))
            self._splits.append((None if single_train else normalize_split(split), data))
        if not isinstance(first, datasets.IterableDataset):
            self.num_rows = sum(len(data) for _, data in self._splits)
        elif files is not None and files.reader == "parquet":
            self.num_rows = files.count()

    def count_rows(self) -> int:
        if self.num_rows is None and self.files is not None:
            self.num_rows = self.files.count()
        return super().count_rows()

    def _records(self, start: int) -> Iterator[tuple[str | None, dict[str, Any]]]:
        for number, (split, data) in enumerate(self._splits):
            if hasattr(data, "num_rows"):
                if start >= data.num_rows:
                    start -= data.num_rows
                    continue
                if start:
                    data, start = data.select(range(start, data.num_rows)), 0
                for batch in data.iter(batch_size=32):
                    for values in zip(*batch.values()):
                        yield split, dict(zip(batch, values))
            else:  # a stream: earlier files are left out, earlier rows of the first one passed over undecoded
                if start and self.files is not None:
                    data, start = self.files.behind(data, number, start)
                for record in data if data is not None else ():
                    if start:
                        start -= 1
                        continue
                    yield split, record

    def rows(self, start: int = 0) -> Iterator[Row]:
        for index, (split, record) in enumerate(self._records(start), start):
            for column, labels in self._names.items():
                if isinstance(record.get(column), int):
                    record[column] = labels.get(record[column])
            image = get(record, self.columns.image)
            path = image.get("path") if isinstance(image, dict) else None
            default_id = f"row-{index:09d}"
            if path and any(Path(path).is_relative_to(root) for root in self.folder.absolute_roots[:1]):
                default_id = str(Path(path).relative_to(self.folder.absolute_roots[0]))
            row = _make_row(record, self.columns, index, default_id, self.folder)
            row.split = row.split or split
            yield row


def _hub_or_local(path: str, options: dict[str, Any], config: str | None, streaming: bool | None) -> Source:
    import datasets

    local = Path(path)
    try:
        if local.is_dir() and ((local / "dataset_dict.json").exists() or (local / "state.json").exists()):
            if (local / "cache.json").exists():
                raise UserError(f"{path} is a feature cache, not a data set of images")
            loaded = datasets.load_from_disk(path)
            splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
            fingerprint = _sha(data._fingerprint for data in splits.values())
            return HuggingFaceSource(path, splits, Folder(root=path), fingerprint, options)
        data_files = find_data_files(path)
        if data_files is not None:
            kind, files, root, sizes = data_files
            streamed = streaming is not False
            # Local files are streamed: loading would copy every image into the library's cache first.
            loaded = datasets.load_dataset(kind, data_files=files, streaming=streamed)
            ordered = Files(kind, [files[split] for split in loaded]) if streamed else None
            return HuggingFaceSource(path, dict(loaded), Folder(root=root), _sha(sizes), options, ordered)
        builder = datasets.load_dataset_builder(path, config)
        loaded = datasets.load_dataset(path, config, streaming=bool(streaming))
        if local.exists():
            listing = [f"{p.relative_to(local)}:{p.stat().st_size}" for p in sorted(files_of(local))]
            root = os.path.abspath(path)
            folder = Folder(root=root, absolute_roots=(root,))
        else:
            data = builder.config.data_files or {}
            listing = [f"{split}:{file}" for split in sorted(data) for file in map(str, data[split])]
            caches = (str(datasets.config.HF_DATASETS_CACHE), str(datasets.config.HF_CACHE_HOME))
            folder = Folder(absolute_roots=caches, remote_prefix=f"hf://datasets/{path}@")
        return HuggingFaceSource(path, dict(loaded), folder, _sha([builder.config.name, *listing]), options)
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ConnectionError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: no data set could be opened there: {type(error).__name__}: {reason}") from error


def _open_one(path: str, options: dict[str, Any], config: str | None, streaming: bool | None) -> Source:
    local = Path(path)
    if local.is_file() and local.suffix in (".jsonl", ".csv"):
        return MetadataFolder(local.parent, [local], options)
    if local.is_dir() and not (local / "dataset_dict.json").exists() and not (local / "state.json").exists():
        places = [local, *sorted(child for child in local.iterdir() if child.is_dir())]
        files = [place / name for place in places for name in METADATA_FILES if (place / name).exists()]
        if files:
            return MetadataFolder(local, files, options)
        if not any(files_of(local)):
            raise UserError(f"{path} is an empty folder")
    here = path.startswith((".", "/", "~")) or (path.count("/") > 1 and "://" not in path)
    if here and not local.exists() and not glob.glob(path):
        raise UserError(f"{path} does not exist; give a folder, files, or the id of a data set on the Hub")
    return _hub_or_local(path, options, config, streaming)


class Mixture(Source):
    """Several sources. Without weights all rows of each in turn; with weights rows drawn in these proportions, each
    at most once, until one source has no more: no image is embedded twice.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None, seed: int = 0):
        self.sources, self.weights, self.seed = list(sources), weights, seed
        self.name = ", ".join(source.name for source in sources)
        self.columns = sources[0].columns
        counts = [source.num_rows for source in sources]
        self.num_rows = sum(counts) if weights is None and None not in counts else None
        self.fingerprint = _sha([*(s.fingerprint for s in sources), json.dumps([weights, seed])])

    def rows(self, start: int = 0) -> Iterator[Row]:
        index = 0
        for number, row in self._drawn():
            if index >= start:
                row.index = index
                row.id = f"{number}/{row.id}"  # ids are unique within a source only
                yield row
            index += 1

    def _drawn(self) -> Iterator[tuple[int, Row]]:
        if self.weights is None:
            for number, source in enumerate(self.sources):
                for row in source.rows():
                    yield number, row
            return
        rng = random.Random(self.seed)
        readers = [source.rows() for source in self.sources]
        while True:
            number = rng.choices(range(len(readers)), self.weights)[0]
            row = next(readers[number], None)
            if row is None:
                return
            yield number, row

    def describe(self) -> str:
        weights = self.weights or [None] * len(self.sources)
        return "\n".join(
            source.describe() + (f"; weight {weight:g}" if weight is not None else "")
            for source, weight in zip(self.sources, weights)
        )


def split_weights(spec: str) -> list[tuple[str, float | None]]:
    """`A=2,B=1` to `[("A", 2.0), ("B", 1.0)]`; a name without weight has None. Raises `UserError`."""
    if Path(spec).exists() or "," not in spec and "=" not in spec:
        return [(spec, None)]
    parts: list[tuple[str, float | None]] = []
    for part in spec.split(","):
        name, sign, weight = part.strip().rpartition("=")
        if not sign or Path(part.strip()).exists():
            parts.append((part.strip(), None))
            continue
        try:
            parts.append((name, float(weight)))
        except ValueError:
            raise UserError(f"{part!r} is no NAME=WEIGHT: {weight!r} is no number") from None
        if parts[-1][1] <= 0:
            raise UserError(f"the weight of {name} is {weight}; it must be above 0")
    return parts


class SplitView(Source):
    """The rows of one split of a source."""

    def __init__(self, source: Source, split: str, validation_share: float, test_share: float):
        self.source, self.split = source, split
        self.shares = (validation_share, test_share)
        self.name, self.columns = f"{source.name} [{split}]", source.columns
        self.fingerprint = _sha([source.fingerprint, split])

    def rows(self, start: int = 0) -> Iterator[Row]:
        passed = 0
        for row in self.source.rows():
            if row.split is None and row.rejected is None:
                try:
                    row.split = split_by_hash(row.image_hash(), *self.shares)
                except ImageError:
                    continue  # without a readable image there is no split; `embed` reports these rows
            if row.split == self.split:
                if passed >= start:
                    yield row
                passed += 1


def open_rows(
    dataset: str,
    image_column: str | None = None,
    caption_columns: Sequence[str] | None = None,
    question_column: str | None = None,
    answer_column: str | None = None,
    split: str | None = None,
    *,
    id_column: str | None = None,
    split_column: str | None = None,
    status_column: str | None = None,
    dataset_config: str | None = None,
    streaming: bool | None = None,
    validation_share: float = 0.05,
    test_share: float = 0.05,
    text_required: bool = True,
    seed: int = 0,
) -> Source:
    """The rows of a data set, or of several (`A,B` all rows of both; `A=2,B=1` drawn in these proportions).

    Args:
        dataset: Hub id, folder with metadata, Parquet or tar files (or a pattern of them), saved `datasets` folder.
        image_column, caption_columns, question_column, answer_column, id_column, split_column, status_column: names;
            by default those known by name. `a/b`: the first that holds text; `json.caption`: nested.
        split: only the rows of this split; the image hash decides where neither a column nor the data set does,
            with `validation_share` and `test_share`.
        streaming: read the Hub, or local files, as a stream; by default only local Parquet and tars are.
        text_required: raise when there is no column of captions or questions.

    Raises:
        UserError: nothing there, or no such columns (the message lists what there is).
    """
    options = {
        "image_column": image_column or None,
        "caption_columns": list(caption_columns or ()),
        "question_column": question_column,
        "answer_column": answer_column,
        "id_column": id_column,
        "split_column": split_column,
        "status_column": status_column,
        "text_required": text_required,
    }
    parts = split_weights(dataset)
    opened = [_open_one(name, options, dataset_config, streaming) for name, _ in parts]
    weights = [weight for _, weight in parts]
    if len(opened) == 1:
        source = opened[0]
    elif all(weight is None for weight in weights):
        source = Mixture(opened, None, seed)
    else:
        source = Mixture(opened, [1.0 if weight is None else weight for weight in weights], seed)
    if split is None:
        return source
    wanted = normalize_split(split)
    if wanted is None:
        raise UserError(f"split {split!r} is none of train, validation, test")
    return SplitView(source, wanted, validation_share, test_share)


__all__ = ["Row", "Source", "open_rows", "split_weights", "texts"]
