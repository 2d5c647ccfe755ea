"""Rows through the `datasets` library: Hub ids, Parquet, Arrow, WebDataset tars, folders of `save_to_disk`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blipren.training.data.sources.columns import find_columns, get
from blipren.training.data.sources.data_files import Files, files_of, find_data_files
from blipren.training.data.sources.images import Folder
from blipren.training.data.sources.kept_columns import undecoded
from blipren.training.data.sources.rows import Row, Source, hash_texts, make_row, parse_record
from blipren.training.data.sources.splits import normalize_split
from blipren.training.errors import UserError


class HuggingFaceSource(Source):
    """Splits that `datasets` opened, map-style or streamed, with their images undecoded."""

    def __init__(
        self,
        name: str,
        splits: dict[str, Any],
        folder: Folder,
        fingerprint: str,
        options: dict[str, Any],
        files: Files | None = None,
        keep_columns: bool = False,
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
                value = parse_record(value) if isinstance(value, (bytes, str)) else value
                nested[column] = value.keys() if isinstance(value, dict) else ()
        images = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
        self.columns = find_columns(list(features), nested, dataset=name, image_features=images, **options)
        wanted = self.columns.wanted() | {"__key__", "__url__"}
        keep = [column for column in features if keep_columns or column in wanted]
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
                if (left := undecoded(kind)) != kind:
                    data = data.cast_column(column, left)
                elif isinstance(kind, datasets.ClassLabel):
                    self._names[column] = dict(enumerate(kind.names))
            self._splits.append((None if single_train else normalize_split(split), data))
        if keep_columns:
            self.features = datasets.Features({column: undecoded(features[column]) for column in keep})
        if not isinstance(first, datasets.IterableDataset):
            self.num_rows = sum(len(data) for _, data in self._splits)
        elif files is not None and files.reader == "parquet":
            self.num_rows = files.count()

    def count_rows(self) -> int:
        if self.num_rows is None and self.files is not None:
            self.num_rows = self.files.count()
        return super().count_rows()

    def _records(self, start: int) -> Iterator[tuple[str | None, dict[str, Any]]]:
        """Yield `(split, columns)` of each row from number `start` on."""
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
            else:  # a stream: earlier files are not read, earlier rows of the first one are not decoded
                if start and self.files is not None:
                    data, start = self.files.skip_to(data, number, start)
                for record in data if data is not None else ():
                    if start:
                        start -= 1
                        continue
                    yield split, record

    def rows(self, start: int = 0) -> Iterator[Row]:
        for index, (split, record) in enumerate(self._records(start), start):
            kept = dict(record) if self.features is not None else None
            for column, labels in self._names.items():
                if isinstance(record.get(column), int):
                    record[column] = labels.get(record[column])
            image = get(record, self.columns.image)
            path = image.get("path") if isinstance(image, dict) else None
            default_id = f"row-{index:09d}"
            if path and any(Path(path).is_relative_to(root) for root in self.folder.absolute_roots[:1]):
                default_id = str(Path(path).relative_to(self.folder.absolute_roots[0]))
            row = make_row(record, self.columns, index, default_id, self.folder)
            row.split, row.record = row.split or split, kept
            yield row


def open_hugging_face(
    path: str,
    options: dict[str, Any],
    config: str | None,
    streaming: bool | None,
    follow_links: bool,
    keep_columns: bool = False,
) -> Source:
    """Open what `datasets` reads. Raises `UserError` where there is no data set."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    local = Path(path)
    try:
        if local.is_dir() and ((local / "dataset_dict.json").exists() or (local / "state.json").exists()):
            if (local / "cache.json").exists():
                raise UserError(f"{path} is a feature cache, not a data set of images")
            loaded = datasets.load_from_disk(path)
            splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
            fingerprint = hash_texts(data._fingerprint for data in splits.values())
            folder = Folder(root=path, follow_links=follow_links)
            return HuggingFaceSource(path, splits, folder, fingerprint, options, keep_columns=keep_columns)
        data_files = find_data_files(path)
        if data_files is not None:
            kind, files, root, sizes = data_files
            streamed = streaming is not False
            # local files are streamed: loading would first copy every image into the library's cache
            loaded = datasets.load_dataset(kind, data_files=files, streaming=streamed)
            ordered = Files(kind, [files[split] for split in loaded]) if streamed else None
            return HuggingFaceSource(
                path,
                dict(loaded),
                Folder(root=root, follow_links=follow_links),
                hash_texts(sizes),
                options,
                ordered,
                keep_columns,
            )
        builder = datasets.load_dataset_builder(path, config)
        loaded = datasets.load_dataset(path, config, streaming=bool(streaming))
        if local.exists():
            listing = [f"{p.relative_to(local)}:{p.stat().st_size}" for p in sorted(files_of(local))]
            root = os.path.abspath(path)
            folder = Folder(root=root, absolute_roots=(root,), follow_links=follow_links)
        else:
            data = builder.config.data_files or {}
            listing = [f"{split}:{file}" for split in sorted(data) for file in map(str, data[split])]
            caches = tuple(map(str, (datasets.config.HF_DATASETS_CACHE, datasets.config.HF_CACHE_HOME, HF_HUB_CACHE)))
            folder = Folder(absolute_roots=caches, remote_prefix=f"hf://datasets/{path}@")
        fingerprint = hash_texts([builder.config.name, *listing])
        return HuggingFaceSource(path, dict(loaded), folder, fingerprint, options, keep_columns=keep_columns)
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ConnectionError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: no data set could be opened there: {type(error).__name__}: {reason}") from error
