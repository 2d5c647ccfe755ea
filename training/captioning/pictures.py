"""What happens to a row before the encoder: its image is decoded and made pixels. A faulty image costs its row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from blipren.training.data.cache.encoder import PIXEL_INPUTS
from blipren.training.data.cache.prepare import rejection
from blipren.training.data.sources.images import ImageError
from blipren.training.data.sources.rows import Row
from blipren.training.evaluation.generation import image_seed

_FAULTS = (ValueError, TypeError, ZeroDivisionError, MemoryError, OverflowError)


@dataclass(frozen=True)
class PictureConfig:
    """Settings of the preparation.

    Attributes:
        image_processor: None where no pixels are needed.
        seed: seed of sampling; None for greedy and beam search.
        keep_images: give the decoded images back, for an engine that makes pixels itself.
    """

    image_processor: Any
    seed: int | None = None
    keep_images: bool = False


@dataclass
class PictureBatch:
    """Rows whose image could be read, in order.

    Attributes:
        kept: places of these rows among those of the batch. pixels: their model inputs.
        seeds: of each kept row, where tokens are sampled. images: PIL images, where they are asked for.
        sizes: width and height of each image.
    """

    kept: list[int]
    pixels: dict[str, Any]
    seeds: list[int]
    images: list[Image.Image]
    sizes: list[tuple[int, int]]
    rejected: list[dict[str, Any]]


def prepare_pictures(rows: list[Row], config: PictureConfig) -> PictureBatch:
    """Decode the images of rows and make pixels. A faulty row is rejected; it raises nothing."""
    found, rejected = [], []
    for place, row in enumerate(rows):
        if row.rejected:
            rejected.append(rejection(row, "row", *row.rejected))
            continue
        try:
            found.append((place, row.load()))
        except ImageError as error:
            rejected.append(rejection(row, "row", error.reason, error.detail))
    pixels: dict[str, Any] = {}
    if found and config.image_processor is not None:
        try:
            pixels = _pixels([image for _, image in found], config)
        except _FAULTS:  # one image that the image processor cannot take fails the whole batch: find it
            good = []
            for place, image in found:
                try:
                    _pixels([image], config)
                    good.append((place, image))
                except _FAULTS as error:
                    size = f"{image.width}x{image.height}"
                    rejected.append(rejection(rows[place], "row", "image_processor", f"{size}: {error}"))
            found = good
            pixels = _pixels([image for _, image in found], config) if found else {}
    return PictureBatch(
        kept=[place for place, _ in found],
        pixels=pixels,
        seeds=[] if config.seed is None else [image_seed(image, config.seed) for _, image in found],
        images=[image for _, image in found] if config.keep_images else [],
        sizes=[image.size for _, image in found],
        rejected=rejected,
    )


def _pixels(images: list[Image.Image], config: PictureConfig) -> dict[str, torch.Tensor]:
    inputs = config.image_processor(images=images, return_tensors="pt")
    return {name: inputs[name] for name in PIXEL_INPUTS if name in inputs}


def pixel_bytes(config: PictureConfig, batch_size: int) -> int:
    """Return the size of a batch's pixels in bytes, measured on a blank image."""
    if config.image_processor is None:
        return 0
    pixels = _pixels([Image.new("RGB", (320, 240))], config)
    return sum(tensor.nbytes + 64 for tensor in pixels.values()) * batch_size
