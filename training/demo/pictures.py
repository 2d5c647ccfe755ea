"""Pictures that the page shows: maps over what the encoder saw, several pictures as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image


def overlay(image: Image.Image, values: torch.Tensor, height: int = 384) -> Image.Image:
    """Return a picture, `height` pixels high, under a map [rows, columns] from 0 to 1; it stays visible where the map is low."""
    image = image.resize((max(1, round(image.width * height / image.height)), height), Image.Resampling.BICUBIC)
    grey = Image.fromarray((values.numpy() * 255).round().astype(np.uint8))
    share = np.asarray(grey.resize(image.size, Image.Resampling.BICUBIC), dtype=np.float32)[..., None] / 255
    colours = colormaps["inferno"](share[..., 0])[..., :3] * 255
    alpha = 0.8 * (0.15 + 0.85 * share)
    return Image.fromarray((np.asarray(image) * (1 - alpha) + colours * alpha).round().astype(np.uint8))


def join(images: Sequence[Image.Image], columns: int = 4, gap: int = 8) -> Image.Image:
    """Return pictures of one height as one picture, `columns` in a row."""
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    height = images[0].height
    width = max(sum(image.width for image in row) + gap * (len(row) - 1) for row in rows)
    joined = Image.new("RGB", (width, len(rows) * (height + gap) - gap), "white")
    for number, row in enumerate(rows):
        left = 0
        for image in row:
            joined.paste(image, (left, number * (height + gap)))
            left += image.width + gap
    return joined


def thumbnail(picture: Image.Image | list[Image.Image], side: int = 320) -> Image.Image:
    """Return a small copy of a picture, or the frames of a clip in rows of four."""
    if isinstance(picture, list):
        picture = join([thumbnail(frame, side // 2) for frame in picture])
        side *= 2
    small = picture.copy()
    small.thumbnail((side, side))
    return small
