"""Digits drawn into pictures, from a font of 5 x 7 points, the same on every machine."""

import random
from dataclasses import dataclass
from math import dist

import numpy as np
from PIL import Image, ImageDraw

_ROWS = {  # each digit as seven rows of five points
    0: "01110 10001 10011 10101 11001 10001 01110",
    1: "00100 01100 00100 00100 00100 00100 01110",
    2: "01110 10001 00001 00110 01000 10000 11111",
    3: "11111 00010 00100 00010 00001 10001 01110",
    4: "00010 00110 01010 10010 11111 00010 00010",
    5: "11111 10000 11110 00001 00001 10001 01110",
    6: "00110 01000 10000 11110 10001 10001 01110",
    7: "11111 00001 00010 00100 01000 01000 01000",
    8: "01110 10001 10001 01110 10001 10001 01110",
    9: "01110 10001 10001 01111 00001 00010 01100",
}
FONT = {digit: np.array([[int(point) for point in row] for row in rows.split()]) for digit, rows in _ROWS.items()}
ASPECT = 5 / 7  # width of a digit as a share of its height
CONTRAST = 160  # least distance of a digit's colour from the ground's, of 441


@dataclass(frozen=True)
class Glyph:
    """One digit. `x` and `y` are its centre and `height` its height, as shares of the picture's side."""

    digit: int
    x: float
    y: float
    height: float
    rgb: tuple[int, int, int]


def random_ink(rng: random.Random, ground: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return a random colour that stands out from the ground."""
    while True:
        rgb = tuple(rng.randrange(256) for _ in range(3))
        if dist(rgb, ground) >= CONTRAST:
            return rgb


def draw_glyphs(image: Image.Image, glyphs: tuple[Glyph, ...]) -> Image.Image:
    """Draw digits into a square image, in place. Draw it several times larger and reduce it for smooth edges."""
    pen = ImageDraw.Draw(image)
    side = image.width
    for g in glyphs:
        point = g.height * side / 7
        left, top = g.x * side - 2.5 * point, g.y * side - 3.5 * point
        for row, column in zip(*np.nonzero(FONT[g.digit])):
            # PIL paints the last pixel too
            box = (left + column * point, top + row * point, left + (column + 1) * point, top + (row + 1) * point)
            low, high = [round(v) for v in box[:2]], [round(v) - 1 for v in box[2:]]
            if low[0] <= high[0] and low[1] <= high[1]:
                pen.rectangle((*low, *high), fill=g.rgb)
    return image
