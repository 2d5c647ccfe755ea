"""Pictures of boxes and points with their words."""

from __future__ import annotations

import colorsys
import re
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from blipren.grounding_blipren import read_places, to_pixels
from blipren.training.data.sources.grounding import FIND, POINT, REFER

LEAST_SIDE = 480  # smaller images are enlarged, so that words can be read
TRUE_COLOUR = (255, 255, 255)


def phrase_of(prompt: str | None) -> str:
    """Return what a prompt of the templates asks for ("Find every red car." -> "red car"), or nothing."""
    for template in (FIND, REFER, POINT):
        pattern = re.escape(template).replace(re.escape("{}"), "(.+)")
        if prompt and (found := re.fullmatch(pattern, prompt.strip())):
            return found[1]
    return ""


def draw_places(
    image: Image.Image, answer: str, prompt: str | None = None, true: Sequence[Sequence[int]] = ()
) -> Image.Image:
    """Return the image with the boxes and points of an answer, each with its words.

    Words stand in black on the light colour of their box, with a dark edge around both, so that they can be read on any
    ground. They are above the box, or inside where there is no room.

    Args:
        prompt: gives the words where the answer has none in front of a box.
        true: boxes in thousandths that are drawn dashed, for comparison.
    """
    scale = max(1.0, LEAST_SIDE / min(image.size))
    image = image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)))
    pen = ImageDraw.Draw(image)
    width = max(2, round(min(image.size) / 200))
    font = ImageFont.load_default(size=max(12, round(min(image.size) / 30)))
    for box in true:
        _dashed(pen, to_pixels(box, image.size), width)
    found = read_places(answer)
    words = found.labels + found.point_labels
    colours = {word: _light_colour(number) for number, word in enumerate(dict.fromkeys(words))}
    labels = []
    for box, word in zip(found.boxes, found.labels):
        corners = to_pixels(box, image.size)
        _outlined(pen, corners, colours[word], width)
        labels.append((corners, word))
    for point, word in zip(found.points, found.point_labels):
        x, y = to_pixels(point, image.size)
        corners = [x - 3 * width, y - 3 * width, x + 3 * width, y + 3 * width]
        pen.ellipse(corners, fill=colours[word], outline="black", width=width)
        labels.append((corners, word))
    for corners, word in labels:  # last, so that no box crosses them
        _write(pen, image.size, corners, word or phrase_of(prompt), colours[word], font, width)
    return image


def _light_colour(number: int) -> tuple[int, int, int]:
    """Return the colour of a label by its number: hues far from each other, all light enough for black words."""
    return tuple(round(255 * v) for v in colorsys.hsv_to_rgb((0.13 + 0.618 * number) % 1, 0.55, 1.0))


def _outlined(pen: ImageDraw.ImageDraw, corners: Sequence[float], colour: tuple[int, int, int], width: int) -> None:
    """Draw a rectangle in a light colour between dark ones."""
    x1, y1, x2, y2 = corners
    pen.rectangle([x1 - 1, y1 - 1, x2 + 1, y2 + 1], outline="black", width=width + 2)
    pen.rectangle(corners, outline=colour, width=width)


def _dashed(pen: ImageDraw.ImageDraw, corners: Sequence[float], width: int) -> None:
    """Draw a rectangle in dashes of white on black."""
    x1, y1, x2, y2 = corners
    for ax, ay, bx, by in ((x1, y1, x2, y1), (x2, y1, x2, y2), (x1, y2, x2, y2), (x1, y1, x1, y2)):
        pen.line([ax, ay, bx, by], fill="black", width=width)
        steps = max(1, round(max(bx - ax, by - ay) / (4 * width)))
        for k in range(0, steps, 2):
            a, b = k / steps, min(1.0, (k + 1) / steps)
            dash = [ax + a * (bx - ax), ay + a * (by - ay), ax + b * (bx - ax), ay + b * (by - ay)]
            pen.line(dash, fill=TRUE_COLOUR, width=width)


def _write(pen, size: tuple[int, int], corners: Sequence[float], word: str, colour, font, width: int) -> None:
    """Write a label above a box, or inside it at the top, and within the image."""
    if not word:
        return
    left, top, right, bottom = pen.textbbox((0, 0), word, font=font)
    wide, high = right - left + 2 * width + 2, bottom - top + 2 * width + 2
    x = max(0, min(corners[0], size[0] - wide))
    y = corners[1] - high if corners[1] >= high else max(0, min(corners[1], size[1] - high))
    pen.rectangle([x, y, x + wide, y + high], fill=colour, outline="black", width=1)
    pen.text((x + width + 1 - left, y + width + 1 - top), word, fill="black", font=font)
