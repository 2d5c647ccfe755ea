"""A reranker: predicts from an image which n-grams people would write of it, and scores the model's own captions by that.

Fang et al. 2015 (arXiv 1411.4952) rank the sentences of a language model by words detected in the image. Here queries
attend to the patch features, and the mean tf-idf vector of the image's captions (n-grams of the language model's tokens)
is predicted in the few directions in which captions differ most. Its product with the vector of a caption is the CIDEr
that the caption is predicted to have.

`reranker.safetensors` holds the network, the sorted hashes of the `ngrams`, their `counts`, `directions` and `common`
weights, and the factor of caption `lengths`. `reranker.json` holds what decided them, and the settings.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .base_models_blipren import find_part, read_part
from .consensus_blipren import NGRAMS, DocumentFrequencies, WeighedCaptions

FORMAT = 1
FOLDER = "reranker"  # of a checkpoint
FILES = ("reranker.json", "reranker.safetensors")
TABLES = ("ngrams", "counts", "directions", "common", "lengths")


@dataclass(frozen=True)
class RerankerSettings:
    """How a reranker changes captions.

    Attributes:
        num_beams: beams of the model's search, all of which become candidates.
        joins, joined, fluency, read: as in [`MemorySettings`].
    """

    num_beams: int = 8
    joins: int = 3
    joined: int = 60
    fluency: float = 0.002
    read: int = 40


class RerankerNetwork(nn.Module):
    """Queries attend to the patches once; a two-layer MLP reads what they found.

    Args:
        patch_width: of the patch features. width: directions that are predicted.
    """

    def __init__(self, patch_width: int, width: int, queries: int, hidden: int, heads: int, dropout: float = 0.3):
        super().__init__()
        self.shape = {"patch_width": patch_width, "width": width, "queries": queries, "hidden": hidden, "heads": heads}
        self.register_buffer("mean", torch.zeros(patch_width))  # of patch features, by which they are standardised
        self.register_buffer("std", torch.ones(patch_width))
        self.dropout = nn.Dropout(dropout)
        self.patches = nn.Linear(patch_width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.queries = nn.Parameter(torch.randn(queries, hidden) / 2)
        self.attention = nn.MultiheadAttention(hidden, heads, dropout, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(queries * hidden), nn.Dropout(dropout), nn.Linear(queries * hidden, 2 * hidden), nn.GELU(),
            nn.Dropout(dropout), nn.Linear(2 * hidden, width),
        )  # fmt: skip

    def forward(self, patch_features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return `(images, width)` from `(images, patches, patch_width)`; the mask has 1 for patches, 0 for padding."""
        patches = self.norm(self.patches(self.dropout((patch_features.float() - self.mean) / self.std)))
        queries = self.queries.expand(len(patches), -1, -1)
        padding = None if mask is None else ~mask.bool()
        found, _ = self.attention(queries, patches, patches, padding, need_weights=False)  # [images, queries, hidden]
        return self.mlp(found.flatten(1))


class BliprenReranker:
    """Scores captions of an image without references.

    Args:
        network: predicts the coordinates of an image's captions.
        tables: `ngrams` `(n,)` sorted hashes, `counts` `(n,)` images that have them, `directions` `(n, width)`, `common`
            `(n,)` mean weights, `lengths` `(l,)` factor by which a caption of so many tokens is compared.
        info: `encoder` and `language_model` that it was made for, `prompts` (token ids without placeholders), `end` (id of
            the end token), `shape` of the network, `images` that it was made from.
        settings: how it changes captions.
    """

    def __init__(
        self, network: RerankerNetwork, tables: dict[str, torch.Tensor], info: dict, settings: RerankerSettings
    ):
        self.network, self.tables, self.info, self.settings = network.eval(), tables, info, settings
        self._ngrams = tables["ngrams"].numpy().view(np.uint64)
        self._directions, self._common = tables["directions"].float().numpy(), tables["common"].float().numpy()
        self._lengths = tables["lengths"].numpy()
        self._frequencies = DocumentFrequencies(self._ngrams, tables["counts"].numpy(), info["images"])

    def save(self, folder: str | os.PathLike) -> None:
        """Write the two files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in {**weights, **self.tables}.items()}
        apart = folder / "reranker.tmp"  # the file may be the one that is memory-mapped
        save_file(tensors, apart, metadata={"format": "pt"})
        apart.replace(folder / FILES[1])
        content = {"format": FORMAT, **self.info, "settings": asdict(self.settings)}
        (folder / FILES[0]).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "BliprenReranker":
        """Open a folder with the two files.

        Raises:
            ValueError: no reranker there, or one of a newer format.
        """
        folder = Path(folder)
        info = read_part(folder, FOLDER, FILES[0], FORMAT)
        settings = RerankerSettings(**info.pop("settings"))
        tensors = load_file(folder / FILES[1])
        tables = {name: tensors.pop(name) for name in TABLES}
        network = RerankerNetwork(**info["shape"])
        network.load_state_dict({name.removeprefix("network."): tensor for name, tensor in tensors.items()})
        return cls(network, tables, info, settings)

    def with_settings(self, **settings) -> "BliprenReranker":
        """Return the same reranker with some settings changed."""
        return BliprenReranker(self.network, self.tables, self.info, replace(self.settings, **settings))

    def fingerprint(self) -> str:
        """Return a hash of what the captions depend on."""
        digest = hashlib.sha256(json.dumps([self.info, asdict(self.settings)], sort_keys=True).encode())
        digest.update(self.network.mlp[-1].weight.detach().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def predict(self, patch_features: torch.Tensor, mask: torch.Tensor | None = None) -> np.ndarray:
        """Return the coordinates of each image's captions, `(images, width)`.

        Args:
            patch_features: `(images, patches, patch_width)`. mask: `(images, patches)`, 1 for patches.
        """
        return self.network.to(patch_features.device)(patch_features, mask).float().cpu().numpy()

    def score(self, captions: list[list[int]], predicted: np.ndarray) -> np.ndarray:
        """Return the CIDEr that each caption (token ids without the end token) is predicted to have, `(captions,)`.

        Args:
            predicted: `(width,)`, of `predict` for the image.
        """
        place, rows, values, lengths = self._weigh(captions)
        alike = np.bincount(rows, values * (self._directions[place] @ predicted + self._common[place]), len(captions))
        return alike * self._lengths[lengths.clip(max=len(self._lengths) - 1)] * 10 / NGRAMS

    def _weigh(self, captions: list[list[int]]) -> tuple[np.ndarray, ...]:
        own = WeighedCaptions(captions, self._frequencies)
        place = np.searchsorted(self._ngrams, own.hashes).clip(max=len(self._ngrams) - 1)
        known = self._ngrams[place] == own.hashes
        return place[known], own.rows[known], own.values[known], own.lengths


def find_reranker(path: str | os.PathLike, hub_kwargs: dict) -> Path | None:
    """Return the folder of a checkpoint's reranker, fetched if it is on the Hub; `None` if it has none."""
    return find_part(path, FOLDER, FILES, hub_kwargs)


__all__ = ["BliprenReranker", "RerankerNetwork", "RerankerSettings", "find_reranker"]
