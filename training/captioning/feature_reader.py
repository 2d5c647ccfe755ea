"""Patch features of the rows of a source, in order: pictures prepared by workers and encoded, or a cache read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from blipren.configuration_blipren import count_pieces
from blipren.training.captioning.decoder import answer_seed
from blipren.training.captioning.image_sources import CacheRows
from blipren.training.captioning.pictures import PictureBatch, PictureConfig, pixel_bytes, prepare_pictures
from blipren.training.data.cache.engines.workers import Workers
from blipren.training.data.sources.rows import Row, Source


class FeatureReader:
    """Patch features of rows.

    Args:
        source: rows; those of a feature cache have their features already.
        model: with the vision encoder; None where nothing is encoded.
        pictures: settings of the preparation.
        batch_size: pictures that the encoder takes at a time.
        workers: processes that prepare pictures; 0 for none.
    """

    def __init__(self, source: Source, model, pictures: PictureConfig, batch_size: int, workers: int):
        self.source, self.model, self.pictures = source, model, pictures
        self.batch_size, self.workers = batch_size, workers
        self.cached = isinstance(source, CacheRows)

    def prepared(self, batches: Iterator[list[Row]], rows_per_batch: int) -> Iterator[tuple[list[Row], PictureBatch]]:
        """Yield batches of rows with their pictures. Those of a cache are not prepared."""
        if self.cached:
            for rows in batches:
                seeds = [] if self.pictures.seed is None else [self._seed(row) for row in rows]
                sizes = [(row.record["width"], row.record["height"]) for row in rows]
                yield rows, PictureBatch(list(range(len(rows))), {}, seeds, [], sizes, [])
            return
        slot = pixel_bytes(self.pictures, rows_per_batch) if self.workers else 0
        with Workers(self.pictures, self.workers, slot, prepare_pictures) as pool:
            ahead, tasks = itertools.tee(batches)
            yield from zip(tasks, pool.map([strip(row) for row in rows] for rows in ahead))

    def _seed(self, row: Row) -> int:
        """Return the seed of a cached image, whose pixels are not known: made of its hash."""
        return answer_seed(int(row.record["image_hash"][:15], 16), self.pictures.seed, 1)

    @torch.inference_mode()
    def features(self, rows: list[Row], batch: PictureBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the features of the kept rows `[rows, patches, width]` and their mask `[rows, patches]` or None."""
        if self.cached:
            return self._cached(rows)
        config, parts = self.model.config, []
        size = max(1, self.batch_size // count_pieces(config.vision_scales, config.vision_tiles))
        for start in range(0, len(batch.kept), size):
            pixels = {name: value[start : start + size].to(self.model.device) for name, value in batch.pixels.items()}
            parts.append(self.model.encode_images(**pixels))
        return torch.cat(parts), batch.pixels.get("pixel_attention_mask")

    def _cached(self, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor | None]:
        parts, masks = [], []
        for split, own in itertools.groupby(rows, key=lambda row: row.image[0]):
            patches, mask = self.source.cache.patch_features(split, [row.image[1] for row in own])
            parts.append(patches)
            masks.append(mask)
        longest = max(part.shape[1] for part in parts)
        pad = torch.nn.functional.pad
        patches = torch.cat([pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts])
        if masks[0] is None:
            return patches, None
        return patches, torch.cat([pad(mask, (0, longest - mask.shape[1])) for mask in masks])


def strip(row: Row) -> Row:
    """Return a row for a worker: without the columns that it does not need."""
    return Row(row.id, row.index, row.image, row.folder, rejected=row.rejected)
