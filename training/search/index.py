"""Image embeddings of stage 1 in a folder, searched by a matrix product, or beyond a million vectors by usearch.

`embeddings.npy` holds `[images, queries, width]` in float32 (one query where the model pools by the mean), `rows.jsonl` the
id, captions and place in reading order of each image's row, `index.json` what decided them; it is written last.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from blipren.training.captioning.feature_reader import FeatureReader
from blipren.training.data.cache.engines.local import Progress
from blipren.training.data.cache.fingerprints import check_same_fingerprint
from blipren.training.data.cache.shards import as_json
from blipren.training.data.sources.rows import Row
from blipren.training.errors import UserError
from blipren.training.files import report_full_disk, write_atomically

EXACT_UP_TO = 1_000_000
"""Vectors that are searched by a matrix product; an approximate index is used beyond."""
BLOCK = 4096  # images whose vectors are multiplied at a time


class ImageIndex:
    """Embeddings of images, opened.

    Attributes:
        rows: `{"id", "place", "captions"}` of each image. vectors: `[images, queries, width]`, memory-mapped.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.info = json.loads((folder / "index.json").read_text())
        self.rows = [json.loads(line) for line in (folder / "rows.jsonl").open(encoding="utf-8")]
        self.vectors = np.load(folder / "embeddings.npy", mmap_mode="r")[: len(self.rows)]

    @property
    def approximate(self) -> bool:
        return self.vectors.shape[0] * self.vectors.shape[1] > EXACT_UP_TO

    def search(self, queries: torch.Tensor, k: int, by_mean: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores and numbers `[queries, k]` of the images that are most similar to each query, best first.

        Args:
            queries: `[queries, width]`, of length one. An image's score is that of its best vector.
            by_mean: compare with the mean of an image's vectors instead, for an image as the query.
        """
        k = min(k, len(self.rows))
        if self.approximate:
            return self._search_approximately(queries, k, by_mean)
        scores = torch.empty(len(queries), 0)
        numbers = torch.empty(len(queries), 0, dtype=torch.long)
        for start in range(0, len(self.rows), BLOCK):
            block = torch.from_numpy(np.array(self.vectors[start : start + BLOCK]))  # a copy: the file is read-only
            block = pooled(block, "mean") if by_mean else block
            found = (block.flatten(0, 1) @ queries.T).view(*block.shape[:2], -1).amax(1).T
            own = torch.arange(start, start + len(block)).expand(len(queries), -1)
            scores, numbers = torch.cat([scores, found], 1), torch.cat([numbers, own], 1)
            scores, best = scores.topk(min(k, scores.shape[1]), dim=1)
            numbers = numbers.gather(1, best)
        return scores, numbers

    def _search_approximately(self, queries: torch.Tensor, k: int, by_mean: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Find candidates by usearch among all vectors, and score their images exactly."""
        per_image = self.vectors.shape[1]
        index = open_vector_index(self.folder / "vectors.usearch", self.vectors)
        scores, numbers = [], []
        for query in queries:
            keys = np.atleast_1d(index.search(query.numpy(), 4 * k * min(per_image, 8)).keys)
            images = np.unique(keys.astype(np.int64) // per_image)
            own = torch.from_numpy(self.vectors[images])
            own = (pooled(own, "mean") if by_mean else own) @ query
            best, places = own.amax(1).topk(min(k, len(images)))
            scores.append(best)
            numbers.append(torch.from_numpy(images)[places])
        return torch.stack(scores), torch.stack(numbers)


def open_vector_index(path: Path, vectors: np.ndarray) -> Any:
    """Open the approximate index of vectors `[images, queries, width]`, built at its first use. Keys count vectors.

    Raises:
        UserError: usearch is not installed.
    """
    try:
        from usearch.index import Index
    except ImportError as error:
        raise UserError(f"more than {EXACT_UP_TO:,} vectors need an index: pip install 'blipren[search]'") from error
    index = Index(ndim=vectors.shape[-1], metric="ip", dtype="f16")
    if path.exists():
        index.load(str(path))
        return index
    count = vectors.shape[1]
    print(f"building an index of {len(vectors) * count:,} vectors", file=sys.stderr)
    for start in range(0, len(vectors), BLOCK):
        block = np.ascontiguousarray(vectors[start : start + BLOCK]).reshape(-1, vectors.shape[-1])
        index.add(np.arange(start * count, start * count + len(block)), block)
    index.save(str(path))
    return index


def pooled(embeddings: torch.Tensor, pooling: str) -> torch.Tensor:
    """Return the vectors of images that a query is compared with, from `[images, queries, width]`."""
    embeddings = embeddings.float()
    return F.normalize(embeddings.mean(1, keepdim=True), dim=-1) if pooling == "mean" else embeddings


def open_index(folder: Path, reader: FeatureReader, model, fingerprint: dict[str, Any]) -> ImageIndex:
    """Open the index of a source, built at its first use. Rows whose image cannot be read are left out and counted.

    Raises:
        UserError: the folder has the index of something else, or no image could be read.
    """
    if (folder / "index.json").exists():
        index = ImageIndex(folder)
        check_same_fingerprint(index.info["fingerprint"], fingerprint, folder)
        return index
    folder.mkdir(parents=True, exist_ok=True)
    rows, rejected, read = [], 0, 0
    source = reader.source.rows()
    count = reader.source.count_rows()
    progress, vectors = Progress(count, 0, "index"), None
    batches: Iterator = iter(lambda: list(itertools.islice(source, reader.batch_size)), [])
    with report_full_disk(folder):
        for batch, prepared in reader.prepared(batches, reader.batch_size):
            rejected += len(prepared.rejected)
            if prepared.kept:
                found = pooled(embed(model, *reader.features(batch, prepared)), model.config.itc_pooling).cpu().numpy()
                if vectors is None:
                    shape = (count, *found.shape[1:])
                    vectors = np.lib.format.open_memmap(folder / "embeddings.npy", "w+", np.float32, shape)
                vectors[len(rows) : len(rows) + len(found)] = found
                rows += [
                    {"id": batch[i].id, "place": read + i, "captions": own_captions(batch[i])} for i in prepared.kept
                ]
            read += len(batch)
            progress.add(len(batch))
        progress.show("\n")
        if vectors is None:
            raise UserError(f"{reader.source.name} has no image that can be read")
        vectors.flush()
    write_atomically(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    info = {"fingerprint": fingerprint, "images": len(rows), "rejected": rejected}
    write_atomically(folder / "index.json", as_json(info))
    print(f"{len(rows) + rejected:,} rows = {len(rows):,} indexed + {rejected:,} rejected")
    return ImageIndex(folder)


def own_captions(row: Row) -> list[str]:
    """Return the captions of a row: answers to the default caption prompt. Those of a cache are columns."""
    texts = row.record if isinstance(row.image, tuple) else {"prompts": row.prompts, "answers": row.answers}
    return [answer for prompt, answer in zip(texts["prompts"], texts["answers"]) if prompt is None]


@torch.inference_mode()
def embed(model, patches: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return image embeddings `[images, queries, width]` from patch features."""
    mask = None if mask is None else mask.to(model.device)
    return model.get_image_embeddings(patch_features=patches.to(model.device), patch_attention_mask=mask)
