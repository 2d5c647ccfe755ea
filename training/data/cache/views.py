"""Views: deterministic crops of an image, among which training draws."""

import random
import re
from collections.abc import Iterable
from typing import NamedTuple

from PIL import Image, ImageOps

_SIDES_AND_DIGITS = re.compile(r"\b(left|right)\b|\d", re.IGNORECASE)


def can_be_mirrored(texts: Iterable[str | None]) -> bool:
    """Return whether no text names a side or a digit, which would be wrong in a mirror image."""
    return not any(_SIDES_AND_DIGITS.search(text) for text in texts if text)


class View(NamedTuple):
    """A part of an image, mirrored or not."""

    corners: tuple[int, int, int, int]
    """x1, y1, x2, y2 in pixels of the image."""
    mirrored: bool = False


def draw_view(size: tuple[int, int], number: int, key: str, flip: bool, scale: float) -> View:
    """Return a view of an image of `size` (width, height). The same `key` and number always give the same view.

    Args:
        number: 0 is the image itself; others are crops of its own shape.
        flip: mirror half of the crops.
        scale: least share of the image's area in a crop.
    """
    if number == 0:
        return View((0, 0, *size))
    rng = random.Random(f"{key}/{number}")
    edge = rng.uniform(scale, 1.0) ** 0.5
    width, height = max(1, round(size[0] * edge)), max(1, round(size[1] * edge))
    left, top = rng.randint(0, size[0] - width), rng.randint(0, size[1] - height)
    mirrored = rng.random() < 0.5
    return View((left, top, left + width, top + height), mirrored and flip)


def cut_view(image: Image.Image, view: View, keep_size: bool) -> Image.Image:
    """Return a view of an image.

    Args:
        keep_size: scale the crop to the image's size, for encoders whose number of patches follows the size.
    """
    if view == View((0, 0, *image.size)):
        return image
    size = image.size
    image = image.crop(view.corners)
    if keep_size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return ImageOps.mirror(image) if view.mirrored else image
