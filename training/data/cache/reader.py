"""Reading a feature cache: `FeatureCache.open(folder)`. Files are memory-mapped and checked when first read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch

from blipren.training.arguments import check_cache_folder
from blipren.training.data.cache.fingerprints import as_stored, encoder_fingerprint, first_difference
from blipren.training.data.cache.samples.tokens import SampleTokens, load_or_build_sample_tokens
from blipren.training.data.cache.shards import CacheDamage, Shard, file_checksum
from blipren.training.data.cache.tokens import TokenTable, load_or_build_tokens
from blipren.training.data.sources.splits import SPLITS
from blipren.training.errors import UserError

LIGHT_COLUMNS = ("id", "image_hash", "num_patches", "width", "height", "prompts", "answers", "messages")
LIGHT_COLUMNS += ("view_prompts", "view_answers")


class FeatureCache:
    """A finished feature cache.

    Attributes:
        folder: where it is.
        info: the content of `cache.json`.
        fingerprint: what decided its content (`encoder`, `storage`, `source`, `splits`, `captions`).
        counts: rows in, cached (in all and by split) and rejected.
        views: views of each image.
        num_patches: patches of every image; None where they differ.
        hidden_size: width of the features.
    """

    def __init__(self, folder: Path, info: dict[str, Any], verify: bool = True):
        self.folder, self.info, self._verify = folder, info, verify
        self.fingerprint: dict[str, Any] = info["fingerprint"]
        self.counts: dict[str, Any] = info["counts"]
        self.views: int = info["views"]
        self.num_patches: int | None = info["num_patches"]
        self.hidden_size: int = info["hidden_size"]
        self.dtype: str = info["dtype"]
        self._shards: dict[tuple[str, int], Shard] = {}
        self._first = {
            split: np.concatenate([[0], np.cumsum([shard["rows"] for shard in info["shards"][split]])])
            for split in SPLITS
        }
        self._light: dict[str, datasets.Dataset] = {}
        self._places: dict[str, np.ndarray | None] = {}

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True) -> FeatureCache:
        """Open a cache without reading its features.

        Args:
            verify: check the bytes that are read against their checksums, each once.

        Raises:
            UserError: no cache there, or an unfinished one.
        """
        folder = Path(folder)
        file = folder / "cache.json"
        check_cache_folder(folder)
        try:
            info = json.loads(file.read_text())
        except ValueError as error:
            raise CacheDamage(f"{file} is damaged ({error}); embed again") from error
        if info.get("format") != 1:
            raise UserError(f"{folder} has cache format {info.get('format')!r}; this version reads format 1")
        return cls(folder, info, verify)

    def check_model(self, model: torch.nn.Module, processor: Any) -> None:
        """Raise `UserError` that names the field in which encoder, layer, precision or preprocessing differ."""
        now = as_stored(encoder_fingerprint(model, processor.image_processor))
        if found := first_difference(self.fingerprint["encoder"], now):
            field, cached, models = found
            raise UserError(
                f"cache {self.folder} does not fit the model: {field} is {cached!r} in the cache and {models!r} in the "
                "model; embed again with this model"
            )

    # ---- rows ------------------------------------------------------------------------------------------------------

    def _load_light(self, split: str) -> None:
        if split not in SPLITS:
            raise UserError(f"split {split!r} is none of {', '.join(SPLITS)}")
        if split in self._light:
            return
        for number in range(len(self.info["shards"][split])):
            self._shard(split, number)  # checks the texts
        full = datasets.load_from_disk(str(self.folder / split))
        light = full.select_columns([name for name in LIGHT_COLUMNS if name in full.column_names])
        places = None
        captions = self.info.get("captions")
        if captions:
            texts = datasets.load_from_disk(str(self.folder / captions["folder"] / split))
            places = np.array(texts["place"], dtype=np.int64)
            light = light.select(places)
            if len(places):  # datasets drops empty parts with their columns
                texts = texts.remove_columns(["id", "place"])
                light = datasets.concatenate_datasets([light.remove_columns(texts.column_names), texts], axis=1)
        self._light[split], self._places[split] = light, places

    def split(self, name: str) -> datasets.Dataset:
        """Return the rows of a split without their features, in the order that `patch_features` counts in.

        Columns: id, image_hash, num_patches, width, height, prompts, answers, and messages where there are any. The
        texts are those of the current caption filter, and true of the image itself. Where views have questions of their
        own about places, `view_prompts` and `view_answers` hold those of each view.
        """
        self._load_light(name)
        return self._light[name]

    def __len__(self) -> int:
        return self.counts["cached"]

    def num_rows(self, split: str) -> int:
        """Return the number of images of a split that the current caption filter leaves a text."""
        return len(self.split(split)) if self.info.get("captions") else int(self._first[split][-1])

    def num_with_captions(self, split: str) -> int:
        """Return the number of images of a split that have a caption."""
        return sum(None in prompts for prompts in self.split(split)["prompts"])

    def num_without_texts(self, split: str) -> int:
        """Return the number of images of a split that have neither a caption nor an answer to a question.

        Caches of earlier versions have them, for rows with a conversation alone.
        """
        answers = self.split(split).select_columns("answers").with_format("arrow")[:]["answers"]
        return int(pc.sum(pc.equal(pc.list_value_length(answers), 0)).as_py() or 0)

    def ids(self, split: str) -> list[str]:
        """Return the ids of the images of a split."""
        return list(self.split(split)["id"])

    def _shard(self, split: str, number: int) -> Shard:
        key = (split, number)
        if key not in self._shards:
            record = self.info["shards"][split][number]
            self._shards[key] = Shard(self.folder / split / record["file"], record, self._verify)
        return self._shards[key]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out memory maps, which worker processes open themselves."""
        return self.__dict__ | {"_shards": {}, "_light": {}, "_places": {}}

    def _where(self, split: str, indices: np.ndarray) -> list[tuple[str, int, int]]:
        """Return (split, shard, row of the shard) of some raw rows of a split."""
        first = self._first[split]
        if len(indices) and not (0 <= indices.min() and indices.max() < first[-1]):
            bad = indices[(indices < 0) | (indices >= first[-1])][0]
            raise IndexError(f"row {bad} of {split}, which has {first[-1]}")
        shards = np.searchsorted(first, indices, "right") - 1
        return [(split, *place) for place in zip(shards.tolist(), (indices - first[shards]).tolist())]

    def patch_features(
        self,
        split: str,
        indices: Sequence[int] | np.ndarray,
        views: Sequence[int] | None = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the features of some rows.

        Args:
            indices: rows of the split, in any order, repeated or not.
            views: which view of each; the image itself by default.
            dtype: of the result; None: as stored (int8 comes as float32).

        Returns:
            `[n, num_patches, hidden_size]`, and the mask `[n, num_patches]` (1 for patches) where numbers differ, else
            None.

        Raises:
            CacheDamage: bytes that are not what was written.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if self.info.get("captions"):
            self._load_light(split)
            indices = self._places[split][indices]
        return self._read_features(self._where(split, indices), views, dtype)

    def features_at(
        self,
        rows: Sequence[int],
        views: Sequence[int] | None = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the features of images by their numbers in `samples`, as `patch_features` does."""
        edges = np.cumsum([self._first[split][-1] for split in SPLITS])
        places = []
        for row in rows:
            split = int(np.searchsorted(edges, row, "right"))
            own = row - (int(edges[split - 1]) if split else 0)
            places += self._where(SPLITS[split], np.array([own]))
        return self._read_features(places, views, dtype)

    def _read_features(
        self, where: list[tuple[str, int, int]], views: Sequence[int] | None, dtype: torch.dtype | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows, scales = [], []
        for split, number, place in where:
            values, scale = self._shard(split, number).row(place)
            rows.append(values)
            scales.append(scale)
        width = self.hidden_size
        lengths = [len(values) // (self.views * width) for values in rows]
        longest = max(lengths, default=self.num_patches or 0)
        stored = np.float32 if self.dtype == "int8" else np.dtype(self.dtype)
        equal = all(length == longest for length in lengths)
        out = (np.empty if equal else np.zeros)((len(rows), longest, width), dtype=stored)
        for number, (values, scale, length) in enumerate(zip(rows, scales, lengths)):
            view = views[number] if views is not None else 0
            if not 0 <= view < self.views:
                raise IndexError(f"view {view} of a cache with {self.views}")
            part = values[view * length * width : (view + 1) * length * width].reshape(length, width)
            if scale is None:
                out[number, :length] = part
            else:
                np.multiply(part, scale[view * length : (view + 1) * length, None], out=out[number, :length])
        features = torch.from_numpy(out)
        mask = None
        if self.num_patches is None:
            mask = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long()
        return features if dtype is None else features.to(dtype), mask

    # ---- conversations ---------------------------------------------------------------------------------------------

    def num_samples(self, split: str) -> int:
        """Return the number of conversations of a split."""
        return self.info["samples"][split]["rows"] if "samples" in self.info else 0

    def samples(self, split: str) -> datasets.Dataset:
        """Return the conversations of a split, in cache/samples/table.py's columns: id, images, messages, rejected."""
        return datasets.load_from_disk(str(self.folder / "samples" / split))

    def all_ids(self) -> list[str]:
        """Return the ids of all images, in the order that `samples` numbers them."""
        return [name for split in SPLITS for name in datasets.load_from_disk(str(self.folder / split))["id"]]

    def all_num_patches(self) -> list[int]:
        """Return the numbers of patches of all images, in that order."""
        return [n for split in SPLITS for n in datasets.load_from_disk(str(self.folder / split))["num_patches"]]

    def sample_tokens(self, split: str, processor: Any, traces: str = "learn") -> SampleTokens:
        """Return the token ids of the conversations of a split for a processor, built once like those of answers."""
        return load_or_build_sample_tokens(self, split, processor, traces)

    # ---- token ids -------------------------------------------------------------------------------------------------

    def tokens(self, split: str, processor: Any) -> TokenTable:
        """Return the token ids of the split's answers for a processor.

        They are built once and kept in `tokens/FINGERPRINT/` beside the features.
        """
        return load_or_build_tokens(self, split, processor)

    # ---- checking --------------------------------------------------------------------------------------------------

    def verify(self) -> list[str]:
        """Read all files. Returns a line for each that differs from what was written."""
        faults = []
        files = [(split, record) for split in SPLITS for record in self.info["shards"][split]]
        files += [(f"samples/{split}", record) for split, record in self.info.get("samples", {}).items()]
        for folder, record in [*files, *(("index", record) for record in self.info["index"])]:
            path = self.folder / folder / record["file"]
            if not path.exists():
                faults.append(f"{path} is missing")
            elif path.stat().st_size != record["bytes"]:
                faults.append(f"{path} has {path.stat().st_size:,} bytes where {record['bytes']:,} were written")
            elif (found := file_checksum(path)) != record["xxh3_128"]:
                faults.append(f"{path} is damaged: its checksum is {found}, not {record['xxh3_128']}")
            elif folder in SPLITS:
                try:
                    Shard(path, record).check_all()
                except CacheDamage as error:
                    faults.append(str(error))
        return faults
