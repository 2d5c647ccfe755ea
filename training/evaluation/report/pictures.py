"""Pictures of the reports: images and maps as text for a page that loads nothing, and grids as PNG files."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from blipren.training.evaluation.attention import Explanation


def image_url(image: Image.Image, edge: int = 320, quality: int = 80) -> str:
    """Return an image, at most `edge` pixels wide and high, as a `data:` URL."""
    small = image.convert("RGB")
    small.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def map_bytes(maps: torch.Tensor) -> str:
    """Return maps [..., height, width] as one byte a place in base64, each map scaled from its minimum to its maximum.

    A uniform map becomes all zero.
    """
    flat = maps.float().reshape(-1, maps.shape[-2] * maps.shape[-1])
    low = flat.amin(dim=1, keepdim=True)
    spread = flat.amax(dim=1, keepdim=True) - low
    scaled = torch.where(spread > 1e-9, (flat - low) / spread.clamp(min=1e-9), torch.zeros_like(flat))
    return base64.b64encode((scaled * 255).round().to(torch.uint8).numpy().tobytes()).decode()


def sample_grid(path: Path, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
    """Draw images with their captions below, four in a row, as a PNG for the model card."""
    from matplotlib.figure import Figure

    lines = -(-len(images) // 4)
    figure = Figure(figsize=(12, 3.6 * lines), layout="constrained")
    axes = figure.subplots(lines, 4, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, caption in zip(axes.flat, images, captions):
        small = image.convert("RGB")
        small.thumbnail((320, 320), Image.Resampling.LANCZOS)
        axis.imshow(small)
        words = "\n".join(textwrap.wrap(caption or "(empty)", 36)[:3])
        axis.set_title(words.replace("$", r"\$"), fontsize=9, y=-0.02, va="top", pad=0)
    figure.savefig(path, format="png", dpi=90)


def first_grid(
    path: str | Path, load: Callable[[int], object], captions: Sequence[Sequence[str]], scores: torch.Tensor
) -> Path:
    """Draw the `similarity_grid` of the first eight images with their first captions."""
    count = min(8, len(captions))
    firsts = torch.tensor([0, *(len(own) for own in captions)]).cumsum(0)[:count]
    chosen = [own[0] for own in captions[:count]]
    return similarity_grid(path, [load(index) for index in range(count)], chosen, scores[:count, firsts])


def similarity_grid(path: str | Path, images: Sequence, captions: Sequence[str], scores: torch.Tensor) -> Path:
    """Draw the similarity of a few images (rows) with a few captions (columns). The diagonal holds the right pairs.

    Args:
        path: PNG to write. images: PIL images, n. captions: n, the i-th of the i-th image. scores: `[n, n]`.
    """
    from matplotlib.figure import Figure

    count = len(images)
    if scores.shape != (count, count) or len(captions) != count:
        raise ValueError(
            f"{count} images need {count} captions and scores; got {len(captions)}, {tuple(scores.shape)}."
        )
    figure = Figure(figsize=(2.2 + 1.1 * count, 1.6 + 1.1 * count), layout="constrained")
    axes = figure.subplots(count, 2, width_ratios=[1, count], squeeze=False)
    grid = axes[0, 1].get_gridspec()
    for row, image in enumerate(images):
        axes[row, 1].remove()
        axes[row, 0].imshow(image.convert("RGB"))
        axes[row, 0].set_axis_off()
    heat = figure.add_subplot(grid[:, 1])
    heat.imshow(scores.numpy(), cmap="viridis", aspect="auto")
    middle = (scores.max() + scores.min()).item() / 2
    for row in range(count):
        for column in range(count):
            value = scores[row, column].item()
            colour = "black" if value > middle else "white"
            weight = "bold" if row == column else "normal"
            heat.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, weight=weight, fontsize=8)
    labels = [textwrap.fill(caption, 18)[:90].replace("$", r"\$") for caption in captions]
    heat.set_xticks(range(count), labels, rotation=60, ha="right", fontsize=7)
    heat.set_yticks([])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def attention_picture(path: Path, explained: Explanation, columns: int = 6) -> None:
    """Draw an image and, for each word of its caption, the word's attention map over the image, as a PNG.

    Each patch of the encoder's grid is one square of the map.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    panels = 1 + len(explained.words)
    lines = -(-panels // columns)
    columns = -(-panels // lines)  # as full as the others, the last line too
    width, height = explained.seen.size
    title = textwrap.wrap(explained.caption, 17 * columns)
    figure = Figure(figsize=(2.1 * columns, 2.1 * lines * height / width + 0.32 * (lines + len(title)) + 0.7))
    figure.set_layout_engine("constrained", w_pad=0.04, h_pad=0.04)
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    axes.flat[0].imshow(explained.seen)
    axes.flat[0].set_title("image", fontsize=11, color="dimgray", style="italic")
    for axis, word, values in zip(axes.flat[1:], explained.words, explained.word_maps):
        axis.imshow(explained.seen)
        axis.imshow(
            values,
            cmap="inferno",
            vmin=0,
            vmax=1,
            alpha=0.2 + 0.6 * values.numpy(),  # the image stays visible where the map is low
            extent=(0, width, height, 0),
            interpolation="nearest",
        )
        axis.set_title(word.replace("$", r"\$"), fontsize=13, weight="bold")
    scale = ScalarMappable(Normalize(0, 1), "inferno")
    bar = figure.colorbar(scale, ax=axes, orientation="horizontal", shrink=0.4, aspect=40, ticks=[0, 1])
    method = (
        "gradient × attention"
        if explained.queries is not None
        else "gradient × patch feature (the connector `patches` has no cross-attention)"
    )
    bar.set_ticklabels(["0", "maximum of the word"])
    bar.set_label(method, fontsize=9)
    figure.suptitle("\n".join(title).replace("$", r"\$"), fontsize=14)
    figure.savefig(path, format="png", dpi=110)
