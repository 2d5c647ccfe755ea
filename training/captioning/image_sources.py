"""What the command `caption` reads beside data sets: image files, folders of images, feature caches."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from blipren.training.arguments import is_dataset
from blipren.training.data.cache import FeatureCache
from blipren.training.data.sources.columns import Columns
from blipren.training.data.sources.images import Folder, ImageError, decode_image, read_file
from blipren.training.data.sources.open_rows import open_rows
from blipren.training.data.sources.rows import Row, Source, hash_texts
from blipren.training.data.sources.splits import SPLITS
from blipren.training.errors import UserError


class ImageFiles(Source):
    """Named image files, and all files of named folders and their subfolders, hidden ones apart, in the order of their paths.

    Links to folders are not followed; they are rows, so that they are reported.

    Raises:
        UserError: a named file is no image, or a folder is empty.
    """

    def __init__(self, names: Sequence[str], follow_links: bool = False):
        self.columns = Columns(image="file_name")
        self.features = datasets.Features({"file_name": datasets.Value("string")})
        self.follow_links = follow_links
        self.files: list[tuple[Path, Path | None]] = []  # path as it is printed, folder that was searched
        for name in map(Path, names):
            if name.is_dir():
                self.files += [(path, name) for path in _files_below(name)]
                continue
            try:
                decode_image(read_file(name))
            except ImageError as error:
                raise UserError(f"{name} cannot be used as an image ({error.reason}): {error.detail}") from error
            self.files.append((name, None))
        self.name = ", ".join(names)
        self.num_rows = len(self.files)
        self.single_folder = len(names) == 1 and Path(names[0]).is_dir()
        if not self.files:
            raise UserError(f"there is no image in {self.name}")
        sizes = (path.lstat().st_size for path, _ in self.files)
        self.fingerprint = hash_texts(f"{path}:{size}" for (path, _), size in zip(self.files, sizes))

    def rows(self, start: int = 0) -> Iterator[Row]:
        for index in range(start, len(self.files)):
            path, folder = self.files[index]
            name = str(path.relative_to(folder)) if self.single_folder else str(path)
            if folder is None:  # the user named this very file
                place, image = Folder(root=str(path.parent), follow_links=True), path.name
            else:
                place = Folder(root=str(folder), follow_links=self.follow_links)
                image = str(path.relative_to(folder))
            yield Row(str(path), index, image, place, record={"file_name": name})


def _files_below(folder: Path) -> list[Path]:
    paths = []
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        paths += [Path(parent, name) for name in files + links if not name.startswith(".")]
        folders[:] = [name for name in folders if not name.startswith(".")]
    return sorted(paths)


class CacheRows(Source):
    """The rows of a feature cache. `Row.image` is `(split, number)`, the place of the patch features."""

    def __init__(self, cache: FeatureCache):
        text = datasets.Value("string")
        self.cache, self.name = cache, str(cache.folder)
        self.columns = Columns(image="patch_features")
        self.features = datasets.Features(
            {
                "id": text,
                "image_hash": text,
                "width": datasets.Value("int32"),
                "height": datasets.Value("int32"),
                "prompts": datasets.List(text),
                "answers": datasets.List(text),
            }
        )
        self.num_rows = sum(cache.num_rows(split) for split in SPLITS)
        self.fingerprint = hash_texts([cache.info["content_hash"], str(cache.info.get("captions"))])

    def rows(self, start: int = 0) -> Iterator[Row]:
        index = 0
        for split in SPLITS:
            rows = self.cache.split(split)
            skipped = min(len(rows), start - index) if start > index else 0
            index += skipped
            if skipped == len(rows):  # `select` does not start at the end
                continue
            for number, record in enumerate(rows.select(range(skipped, len(rows))), skipped):
                kept = {name: record[name] for name in self.features}
                yield Row(record["id"], index, (split, number), split=split, record=kept)
                index += 1


def open_images(names: Sequence[str], split: str | None, limit: int | None, options: dict[str, Any]) -> Source:
    """Open image files, folders of images, a feature cache or a data set.

    Args:
        names: what the user named; several are image files and folders of them.
        split, options: of `open_rows`, for a data set. limit: take only the first rows.

    Raises:
        UserError: there is nothing to caption, or a split of what has none.
    """
    if len(names) == 1 and is_dataset(names[0]):
        name = names[0]
        if (Path(name) / "cache.json").exists():
            cache = FeatureCache.open(name)
            if cache.fingerprint["storage"].get("num_frames") is not None:
                raise UserError(
                    f"{name} holds videos, and captions of whole data sets are of images: use the pipeline"
                )
            source = CacheRows(cache)
            if split is not None:
                raise UserError(f"{name} is a feature cache, which is captioned as a whole: leave out --split")
        else:
            source = open_rows(name, split=split, text_required=False, keep_columns=True, **options)
            if source.columns.video:
                raise UserError(
                    f"{name} holds videos, and captions of whole data sets are of images: use the pipeline"
                )
    else:
        if split is not None:
            raise UserError(f"{', '.join(names)}: images without a data set have no splits: leave out --split")
        source = ImageFiles(names, options["follow_links"])
    return source if limit is None else FirstRows(source, limit)


class FirstRows(Source):
    """The first rows of a source."""

    def __init__(self, source: Source, limit: int):
        self.source, self.limit = source, limit
        self.name, self.columns, self.features = source.name, source.columns, source.features
        self.num_rows = None if source.num_rows is None else min(limit, source.num_rows)
        self.fingerprint = hash_texts([source.fingerprint, str(limit)])

    def count_rows(self) -> int:
        return min(self.limit, self.source.count_rows())

    def rows(self, start: int = 0) -> Iterator[Row]:
        yield from itertools.islice(self.source.rows(start), max(0, self.limit - start))


__all__ = ["CacheRows", "FirstRows", "ImageFiles", "open_images"]
