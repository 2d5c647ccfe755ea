"""Rows from anything that `datasets.load_dataset` reads, one data set or several. URLs are never fetched."""

from __future__ import annotations

import glob
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blipren.training.arguments import DATA_SUFFIXES, METADATA_FILES, check_dataset, split_weights
from blipren.training.data.sources.data_files import check_readable, files_of
from blipren.training.data.sources.hugging_face import open_hugging_face
from blipren.training.data.sources.images import ImageError
from blipren.training.data.sources.kept_columns import join_features
from blipren.training.data.sources.metadata_folder import MetadataFolder
from blipren.training.data.sources.rows import Row, Source, hash_texts
from blipren.training.data.sources.settings import GroundingSettings
from blipren.training.data.sources.splits import normalize_split, split_by_hash
from blipren.training.errors import UserError


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
    follow_links: bool = False,
    validation_share: float = 0.05,
    test_share: float = 0.05,
    text_required: bool = True,
    keep_columns: bool = False,
    seed: int = 0,
) -> Source:
    """Open the rows of a data set, or of several (`A,B` all rows of both; `A=2,B=1` drawn in these proportions).

    Args:
        dataset: Hub id, folder with metadata, Parquet or tar files (or a pattern of them), saved `datasets` folder.
        image_column, caption_columns, question_column, answer_column, id_column, split_column, status_column: names;
            by default those known by name. `a/b`: the first that holds text; `json.caption`: nested.
        split: only the rows of this split; the image hash decides where neither a column nor the data set does,
            with `validation_share` and `test_share`.
        streaming: read the Hub, or local files, as a stream; by default only local Parquet and tars are.
        follow_links: read links that lead out of the data set's folder; else rows that name one are rejected.
        text_required: raise when there is no column of captions or questions.
        keep_columns: give every row all columns of the data set (`Row.record`), with their types in `features`.

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
    check_dataset(dataset)
    parts = split_weights(dataset)
    opened = [_open_one(name, options, dataset_config, streaming, follow_links, keep_columns) for name, _ in parts]
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


def grounding_options(settings: GroundingSettings) -> dict[str, Any]:
    """Return the keyword arguments of `open_rows` for rows with boxes and points; none if no questions are made of them."""
    return {"keep_columns": True, "text_required": False} if settings.grounding else {}


def _open_one(
    path: str,
    options: dict[str, Any],
    config: str | None,
    streaming: bool | None,
    follow_links: bool,
    keep_columns: bool,
) -> Source:
    local = Path(path)
    if local.is_file() and local.suffix in (".jsonl", ".json", ".csv"):
        return MetadataFolder(local.parent, [local], options, follow_links, keep_columns)
    if local.is_dir():
        check_readable((file for file in files_of(local) if file.suffix in DATA_SUFFIXES), local, follow_links)
    elif glob.has_magic(path):
        for file in glob.glob(path, recursive=True):
            check_readable([Path(file)], Path(file).parent, follow_links)
    if local.is_dir() and not (local / "dataset_dict.json").exists() and not (local / "state.json").exists():
        places = [local, *sorted(child for child in local.iterdir() if child.is_dir())]
        files = [place / name for place in places for name in METADATA_FILES if (place / name).exists()]
        check_readable(files, local, follow_links)  # also of a folder that is a link
        if files:
            return MetadataFolder(local, files, options, follow_links, keep_columns)
        if not any(files_of(local)):
            raise UserError(f"{path} is an empty folder")
    return open_hugging_face(path, options, config, streaming, follow_links, keep_columns)


class SplitView(Source):
    """One split of a source."""

    def __init__(self, source: Source, split: str, validation_share: float, test_share: float):
        self.source, self.split = source, split
        self.shares = (validation_share, test_share)
        self.name, self.columns = f"{source.name} [{split}]", source.columns
        self.features = source.features
        self.fingerprint = hash_texts([source.fingerprint, split])

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


class Mixture(Source):
    """Several sources as one.

    Without weights it has all rows of each source in turn. With weights, rows are drawn in these proportions, each once,
    until one source has no more.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None, seed: int = 0):
        self.sources, self.weights, self.seed = list(sources), weights, seed
        self.name = ", ".join(source.name for source in sources)
        self.columns = sources[0].columns
        counts = [source.num_rows for source in sources]
        self.num_rows = sum(counts) if weights is None and None not in counts else None
        if self.sources[0].features is not None:
            self.features = join_features([source.features for source in sources])
        self.fingerprint = hash_texts([*(s.fingerprint for s in sources), json.dumps([weights, seed])])

    @property
    def has_conversations(self) -> bool:
        return any(source.has_conversations for source in self.sources)

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
