"""Pictures as text for a page that loads nothing: photos as JPEG data addresses, maps as bytes in base64."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image


def photo_address(photo: Image.Image, edge: int = 320, quality: int = 80) -> str:
    """A photo, at most `edge` pixels wide and high, as a `data:` address."""
    small = photo.convert("RGB")
    small.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def map_bytes(maps: torch.Tensor, lowest_is_zero: bool = True) -> str:
    """Maps [..., height, width] as one byte a place, each scaled by its own largest value (and smallest, if wanted).

    A flat map stays dark: what has no spread shows nothing.
    """
    flat = maps.float().reshape(-1, maps.shape[-2] * maps.shape[-1])
    low = flat.amin(dim=1, keepdim=True) if lowest_is_zero else torch.zeros(len(flat), 1)
    spread = flat.amax(dim=1, keepdim=True) - low
    scaled = torch.where(spread > 1e-9, (flat - low) / spread.clamp(min=1e-9), torch.zeros_like(flat))
    return base64.b64encode((scaled * 255).round().to(torch.uint8).numpy().tobytes()).decode()


def sample_grid(path: Path, photos: Sequence[Image.Image], captions: Sequence[str]) -> None:
    """Photos with their captions beneath, four in a row, as one PNG: what a model card shows."""
    from matplotlib.figure import Figure

    lines = -(-len(photos) // 4)
    figure = Figure(figsize=(12, 3.6 * lines), layout="constrained")
    axes = figure.subplots(lines, 4, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, photo, caption in zip(axes.flat, photos, captions):
        small = photo.convert("RGB")
        small.thumbnail((320, 320), Image.Resampling.LANCZOS)
        axis.imshow(small)
        words = "\n".join(textwrap.wrap(caption or "(empty)", 36)[:3])
        axis.set_title(words.replace("$", r"\$"), fontsize=9, y=-0.02, va="top", pad=0)
    figure.savefig(path, format="png", dpi=90)
