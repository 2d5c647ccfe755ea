"""A memory: embeddings and captions of known images, in a folder of the checkpoint.

`embeddings.safetensors` holds `embeddings` `(entries, width)`, the mean patch feature of each image, standardised and in
float16, with the `mean`, `std` and `scale` (median squared distance) that do it, the sorted `caption_hashes`, and the
`letters` of each token, by which captions are compared word for word (without them, by their tokens).
`texts.arrow` holds id, image hash, captions and their token ids. `memory.json` holds what decided them, and the settings.
"""

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .base_models_blipren import find_part, read_part
from .consensus_blipren import DocumentFrequencies, ReferenceTable, hash_captions, hash_letters

logger = logging.getLogger(__name__)
try:  # only a model with a memory needs it
    import pyarrow
except ImportError:
    pyarrow = None
try:  # only a memory of more than `EXACT_UP_TO` images needs it
    from usearch.index import Index
except ImportError:
    Index = None

FORMAT = 1
FOLDER = "memory"  # of a checkpoint
FILES = ("memory.json", "embeddings.safetensors", "texts.arrow")
INDEX = "index.usearch"
EXACT_UP_TO = 1_000_000
"""Entries that are searched by a matrix product; an approximate index is used beyond."""
BLOCK = 1 << 16  # entries that are multiplied at a time
MOST_REGRESSED = 2_000  # a regression over all entries up to so many, else over the nearest ones
MARGIN = 64  # more entries that are looked at where near duplicates are left out
COUNTED = 5_000  # images whose n-grams are counted


@dataclass(frozen=True)
class MemorySettings:
    """How a memory changes captions, see [`BliprenRankingMixin`].

    Attributes:
        neighbours: entries whose captions predict the score of a candidate (all entries where they are few).
        ridge, kernel_width: of the kernel ridge regression; the width is in units of the median squared distance.
        guides: nearest entries whose captions guide the search for candidates.
        guidance: weights of their n-gram model; with each one a search gives candidates. 0 is the model alone.
        num_beams: beams of these searches, all of which become candidates.
        retrieved: nearest entries whose captions are candidates too; 0 leaves them out.
        joins: how often the best candidates are joined with each other, see `join_captions`; 0 leaves that out.
        joined: how many of them.
        fluency: weight of the language model's log-likelihood of a candidate, without the image; 0 does not read any.
        read: candidates of the highest predicted score that the language model reads.
        invention_penalty: weight of doubts about words, see `ReferenceTable.doubts`, in a large memory (`doubt_weight`).
        copy_penalty: is taken from the predicted CIDEr of a candidate that is a known caption, word for word.
        near_duplicate: cosine of embeddings from which on two images count as near duplicates.
    """

    neighbours: int = 400
    ridge: float = 1.0
    kernel_width: float = 2.0
    guides: int = 50
    guidance: tuple[float, ...] = (0.0, 0.5)
    num_beams: int = 5
    retrieved: int = 200
    joins: int = 3
    joined: int = 60
    fluency: float = 0.002
    read: int = 40
    invention_penalty: float = 0.33
    copy_penalty: float = 0.1
    near_duplicate: float = 0.9


@dataclass
class Neighbours:
    """Entries that are most similar to images, best first.

    Attributes:
        indices: `(images, k)` numbers of entries, -1 where there are fewer.
        similarities: `(images, k)` cosines of the standardised embeddings.
    """

    indices: torch.Tensor
    similarities: torch.Tensor


class BliprenMemory:
    """Embeddings and captions of known images.

    Args:
        embeddings: `(entries, width)`, standardised. statistics: the other tensors of `embeddings.safetensors`.
        texts: Arrow table with columns id, image_hash, captions, tokens.
        info: `encoder` and `language_model` that it was made for, `prompts` whose answers the captions are (token ids
            without placeholders), `end` (id of the end token).
        settings: how it changes captions.
    """

    def __init__(self, embeddings, statistics: dict, texts, info: dict, settings: MemorySettings, index=None):
        self.embeddings, self.statistics, self.texts = embeddings, statistics, texts
        self.info, self.settings, self.index = info, settings, index
        self.leave_out_duplicates = False  # of the image itself, where a memory is evaluated on its own images
        self.folder: Path | None = None  # whose files these are
        self._ids, self._frequencies, self._all = None, None, None

    def __len__(self) -> int:
        return self.embeddings.shape[0]

    # ---- making, saving, loading ----------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        embeddings: torch.Tensor,
        texts: dict[str, list],
        info: dict,
        letters: torch.Tensor,
        settings: MemorySettings | None = None,
    ):
        """Make a memory.

        Args:
            embeddings: `(entries, width)`, mean patch features.
            texts: lists `id`, `image_hash`, `captions` (texts of each image) and `tokens` (their ids, without end token).
            letters: of each token, from `letters_of_tokens`.

        Raises:
            ValueError: fewer than two entries, or the lists differ in length.
        """
        if len(embeddings) < 2 or any(len(column) != len(embeddings) for column in texts.values()):
            raise ValueError(f"a memory needs at least 2 entries and as many texts; {len(embeddings)} were given")
        embeddings = embeddings.float()
        mean, std = embeddings.mean(dim=0), embeddings.std(dim=0).clamp_min(1e-6)
        standard = torch.empty(embeddings.shape, dtype=torch.float16)
        for start in range(0, len(embeddings), BLOCK):
            standard[start : start + BLOCK] = (embeddings[start : start + BLOCK] - mean) / std
        some = standard[:: max(1, len(embeddings) // MOST_REGRESSED)].float()
        scale = torch.cdist(some, some).square().median().clamp_min(1e-6)
        memory = cls(
            standard,
            {"mean": mean, "std": std, "scale": scale, "letters": letters},
            _require_arrow().table(texts, schema=_schema()),
            info,
            settings or MemorySettings(),
        )
        memory._hash_captions()
        return memory

    def _hash_captions(self) -> None:
        hashes = self._hashes([ids for own in self.texts["tokens"].to_pylist() for ids in own])
        self.statistics["caption_hashes"] = torch.from_numpy(np.unique(hashes))

    def _hashes(self, captions: list[list[int]]) -> np.ndarray:
        letters = self.statistics.get("letters")  # memories had none at first
        return (hash_captions(captions) if letters is None else hash_letters(captions, letters)).view(np.int64)

    def extend(self, embeddings: torch.Tensor, texts: dict[str, list]) -> "BliprenMemory":
        """Return a memory with more entries. Entries whose image it has already, by id or image hash, are left out."""
        known_ids, known = set(self.texts["id"].to_pylist()), set(self.texts["image_hash"].to_pylist()) - {""}
        kept = [
            i
            for i, (name, image) in enumerate(zip(texts["id"], texts["image_hash"], strict=True))
            if name not in known_ids and image not in known
        ]
        more = (embeddings[kept].float() - self.statistics["mean"]) / self.statistics["std"]
        table = pyarrow.table({name: [column[i] for i in kept] for name, column in texts.items()}, schema=_schema())
        memory = BliprenMemory(
            torch.cat([self.embeddings, more.half()]),
            dict(self.statistics),
            pyarrow.concat_tables([self.texts, table]),
            self.info,
            self.settings,
        )
        memory._hash_captions()
        return memory

    def save(self, folder: str | os.PathLike) -> None:
        """Write the memory. Over a million entries with the index that searches them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"embeddings": self.embeddings, **self.statistics}
        apart = folder / "embeddings.tmp"  # the files may be the ones that are memory-mapped
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, apart, metadata={"format": "pt"})
        apart.replace(folder / FILES[1])
        apart = folder / "texts.tmp"
        with pyarrow.OSFile(str(apart), "wb") as file, pyarrow.ipc.new_file(file, self.texts.schema) as writer:
            writer.write_table(self.texts)
        apart.replace(folder / FILES[2])
        if len(self) > EXACT_UP_TO:
            self._open_index().save(str(folder / INDEX))
        settings = asdict(self.settings)
        content = {"format": FORMAT, "entries": len(self), **self.info, "settings": settings}
        (folder / FILES[0]).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "BliprenMemory":
        """Open a folder of memory files; texts are memory-mapped.

        Raises:
            ValueError: no memory there, one of a newer format, or its files do not belong together.
        """
        folder = Path(folder)
        info = read_part(folder, FOLDER, FILES[0], FORMAT)
        texts = _require_arrow().ipc.open_file(pyarrow.memory_map(str(folder / FILES[2]))).read_all()
        with safe_open(folder / FILES[1], "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        settings, entries = info.pop("settings"), info.pop("entries")
        settings["guidance"] = tuple(settings["guidance"])
        settings.pop("recombined", None)  # of memories of before captions were joined
        embeddings = tensors.pop("embeddings")
        if not len(embeddings) == len(texts) == entries:
            raise ValueError(
                f"the memory in {folder} is damaged: {entries} entries, {len(embeddings)} embeddings, {len(texts)} texts"
            )
        if "letters" not in tensors:
            logger.warning("the memory in %s compares captions by tokens; make it again to compare words", folder)
        index = folder / INDEX if (folder / INDEX).is_file() else None
        memory = cls(embeddings, tensors, texts, info, MemorySettings(**settings), index)
        memory.folder = folder
        return memory

    def with_settings(self, **settings) -> "BliprenMemory":
        """Return the same memory with some settings changed."""
        return BliprenMemory(
            self.embeddings, self.statistics, self.texts, self.info, replace(self.settings, **settings), self.index
        )

    def fingerprint(self) -> str:
        """Return a hash of what the captions depend on."""
        digest = hashlib.sha256(json.dumps([self.info, asdict(self.settings), len(self)], sort_keys=True).encode())
        digest.update(self.statistics["caption_hashes"].numpy().tobytes() + self.statistics["mean"].numpy().tobytes())
        return digest.hexdigest()[:16]

    # ---- neighbours ---------------------------------------------------------------------------------------------

    def standardise(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return mean patch features `(images, width)` as the memory stores them, in float32."""
        return (embeddings.float().cpu() - self.statistics["mean"]) / self.statistics["std"]

    def find(self, embeddings: torch.Tensor, k: int, exclude: list[str | None] | None = None) -> Neighbours:
        """Find the `k` nearest entries of each image, by distance of standardised embeddings.

        With `leave_out_duplicates` near duplicates of an image, by `settings.near_duplicate`, are none of them.

        Args:
            embeddings: `(images, width)`, mean patch features.
            exclude: id of each image; its own entries are left out, with their near duplicates.
        """
        queries = self.standardise(embeddings)
        filtered = self.leave_out_duplicates or exclude is not None
        distances, indices = self._nearest(queries, min(k + MARGIN * filtered, len(self)))
        squares, own_squares = queries.square().sum(dim=1, keepdim=True), self._squares_of(indices)
        similarities = (squares + own_squares - distances) / 2 / (squares * own_squares).sqrt().clamp_min(1e-6)
        if filtered:
            left_out = similarities >= self.settings.near_duplicate
            for row, name in enumerate(exclude or []):
                left_out[row] |= torch.isin(indices[row], self._entries_of(name))
            order = left_out.int().argsort(dim=1, stable=True)
            indices = indices.masked_fill(left_out, -1).gather(1, order)
            similarities = similarities.gather(1, order)
        return Neighbours(indices[:, :k], similarities[:, :k])

    def _entries_of(self, name: str | None) -> torch.Tensor:
        if self._ids is None:
            self._ids = {}
            for entry, own in enumerate(self.texts["id"].to_pylist()):
                self._ids.setdefault(own, []).append(entry)
        return torch.tensor(self._ids.get(name, []), dtype=torch.long)

    def _squares_of(self, indices: torch.Tensor) -> torch.Tensor:
        return self.embeddings[indices.flatten()].float().square().sum(dim=1).view(indices.shape)

    def _nearest(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return squared distances and numbers `(images, k)` of the nearest entries."""
        squares = queries.square().sum(dim=1, keepdim=True)
        if len(self) > EXACT_UP_TO:
            keys = self._open_index().search(queries.numpy(), k).keys
            indices = torch.from_numpy(np.atleast_2d(keys).astype(np.int64))
            entries = self.embeddings[indices].float()  # [images, k, width]
            distances = squares + entries.square().sum(dim=2) - 2 * (entries @ queries[:, :, None])[:, :, 0]
            distances, order = distances.sort(dim=1)
            return distances, indices.gather(1, order)
        distances, indices = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
        for start in range(0, len(self), BLOCK):
            block = self.embeddings[start : start + BLOCK].float()
            found = squares + block.square().sum(dim=1) - 2 * queries @ block.T
            own = torch.arange(start, start + len(block)).expand(len(queries), -1)
            distances, indices = torch.cat([distances, found], 1), torch.cat([indices, own], 1)
            distances, best = distances.topk(min(k, distances.shape[1]), dim=1, largest=False)
            indices = indices.gather(1, best)
        return distances, indices

    def _open_index(self):
        """Return the approximate index of the embeddings, which is built where there is no file of it."""
        if Index is None:
            raise ImportError(f"a memory of more than {EXACT_UP_TO:,} images needs an index: pip install usearch")
        if not isinstance(self.index, Index):
            index = Index(ndim=self.embeddings.shape[1], metric="l2sq", dtype="f16")
            if self.index is not None:
                index.load(str(self.index))
            else:
                for start in range(0, len(self), BLOCK):
                    block = self.embeddings[start : start + BLOCK].numpy()
                    index.add(np.arange(start, start + len(block)), block)
            self.index = index
        return self.index

    # ---- captions -----------------------------------------------------------------------------------------------

    def captions(self, entries: list[int]) -> list[list[str]]:
        """Return the captions of entries as texts."""
        return self.texts["captions"].take(pyarrow.array(entries, pyarrow.int64())).to_pylist()

    def tokens(self, entries: list[int]) -> list[list[list[int]]]:
        """Return the captions of entries as token ids."""
        return self.texts["tokens"].take(pyarrow.array(entries, pyarrow.int64())).to_pylist()

    def are_copies(self, captions: list[list[int]]) -> np.ndarray:
        """Return whether each caption, as token ids, is a known one word for word."""
        known, hashes = self.statistics["caption_hashes"].numpy(), self._hashes(captions)
        return known[np.searchsorted(known, hashes).clip(max=len(known) - 1)] == hashes

    def frequencies(self) -> DocumentFrequencies:
        """Return document frequencies of n-grams, counted over at most `COUNTED` entries that lie evenly."""
        if self._frequencies is None:
            step = max(1, len(self) // COUNTED)
            self._frequencies = DocumentFrequencies.count(self.tokens(list(range(0, len(self), step))))
        return self._frequencies

    @property
    def num_regressed(self) -> int:
        """How many neighbours predict the score of a candidate."""
        return len(self) if len(self) <= MOST_REGRESSED else self.settings.neighbours

    def regress(self, query: torch.Tensor, entries: torch.Tensor) -> tuple[ReferenceTable, np.ndarray]:
        """Return the captions of entries, and the weights by which their scores predict that of the query's captions.

        Kernel ridge regression with a Gaussian kernel, of what lies above the mean score of all entries given.

        Args:
            query: `(width,)`, standardised. entries: `(k,)` their numbers.
        """
        whole = len(entries) == len(self) <= MOST_REGRESSED
        if whole and self._all is not None:
            table, inverse = self._all
            entries = torch.arange(len(self))
        else:
            entries = entries.sort().values
            table, inverse = ReferenceTable(self.tokens(entries.tolist()), self.frequencies()), None
        known = self.embeddings[entries].double()
        width = self.statistics["scale"].double() * self.settings.kernel_width
        if inverse is None:
            kernel = torch.exp(-torch.cdist(known, known).square() / width)
            inverse = torch.linalg.inv(kernel + self.settings.ridge * torch.eye(len(known), dtype=torch.double))
            if whole:
                self._all = table, inverse
        weights = inverse @ torch.exp(-(known - query.double()).square().sum(dim=1) / width)
        return table, (weights + (1 - weights.sum()) / len(weights)).numpy()


def find_memory(path: str | os.PathLike, hub_kwargs: dict) -> Path | None:
    """Return the folder of a checkpoint's memory, fetched if it is on the Hub; `None` if it has none."""
    return find_part(path, FOLDER, FILES, hub_kwargs, optional=(INDEX,))


def _require_arrow():
    if pyarrow is None:
        raise ImportError("this model has a memory, whose texts are Arrow: pip install pyarrow")
    return pyarrow


def _schema():
    tokens = pyarrow.list_(pyarrow.list_(pyarrow.int32()))
    captions = pyarrow.list_(pyarrow.string())
    return pyarrow.schema(
        [("id", pyarrow.string()), ("image_hash", pyarrow.string()), ("captions", captions), ("tokens", tokens)]
    )


__all__ = ["BliprenMemory", "MemorySettings", "Neighbours", "find_memory"]
