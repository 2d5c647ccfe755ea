"""Views: deterministic crops of an image, among which training draws."""

import random
import re
from collections.abc import Iterable

from PIL import Image, ImageOps

_SIDES_AND_DIGITS = re.compile(r"\b(left|right)\b|\d", re.IGNORECASE)


def can_be_mirrored(texts: Iterable[str | None]) -> bool:
    """Return whether no text names a side or a digit, which would be wrong in a mirror image."""
    return not any(_SIDES_AND_DIGITS.search(text) for text in texts if text)


def cut_view(image: Image.Image, view: int, key: str, flip: bool, scale: float, keep_size: bool) -> Image.Image:
    """Return a view of an image. The same `key` and number always give the same view.

    Args:
        view: 0 is the image itself; others are crops of its own shape.
        flip: mirror half of the crops.
        scale: least share of the image's area in a crop.
        keep_size: scale the crop to the image's size, for encoders whose number of patches follows the size.
    """
    if view == 0:
        return image
    rng = random.Random(f"{key}/{view}")
    edge = rng.uniform(scale, 1.0) ** 0.5
    width, height = max(1, round(image.width * edge)), max(1, round(image.height * edge))
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    mirrored = rng.random() < 0.5
    size = image.size
    image = image.crop((left, top, left + width, top + height))
    if keep_size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return ImageOps.mirror(image) if mirrored and flip else image
