"""Digits drawn into pictures, from a font of 5 x 7 points, the same on every machine."""

import random
from dataclasses import dataclass
from math import dist
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from blipren.training.quickstart.wording import NUMBERS, place, place_answer

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


# ---- pictures with small digits, and their texts --------------------------------------------------------------------

PICTURE_SIDE = 384  # four times the side that the image tower sees
SMALL = 24 / PICTURE_SIDE  # height of a digit: 24 pixels of the picture, six of what the tower sees


class Cell(NamedTuple):
    """A cell of the 3 x 3 grid."""

    row: int
    column: int


@dataclass(frozen=True)
class DigitPicture:
    """One to three small digits, each in a cell of a 3 x 3 grid, in reading order; `cells` are their rows and columns."""

    glyphs: tuple[Glyph, ...]
    cells: tuple[Cell, ...]
    ground: tuple[int, int, int]


def make_digit_picture(seed: int, index: int) -> DigitPicture:
    """Return picture number `index` of a seed."""
    rng = random.Random(f"{seed}/digits/{index}")
    level = rng.randint(165, 195)
    ground = tuple(level + rng.randint(-8, 8) for _ in range(3))
    cells = sorted(
        rng.sample([Cell(row, column) for row in range(3) for column in range(3)], rng.choice((1, 2, 2, 3, 3)))
    )
    glyphs = tuple(
        Glyph(
            rng.randrange(10),
            (cell.column + rng.uniform(0.1, 0.9)) / 3,
            (cell.row + rng.uniform(0.1, 0.9)) / 3,
            SMALL,
            random_ink(rng, ground),
        )
        for cell in cells
    )
    return DigitPicture(glyphs, tuple(cells), ground)


def draw_digit_picture(picture: DigitPicture, side: int = PICTURE_SIDE) -> Image.Image:
    """Draw a picture; the digits are drawn twice as large and averaged."""
    return draw_glyphs(Image.new("RGB", (2 * side, 2 * side), picture.ground), picture.glyphs).reduce(2)


def digit_notes(picture: DigitPicture) -> list[str]:
    """Return what soft tokens may say of a picture: " 7 top left" for each digit."""
    return [f" {g.digit} {place_answer(cell)}" for g, cell in zip(picture.glyphs, picture.cells)]


def write_digit_texts(picture: DigitPicture) -> tuple[str, list[tuple[str, str]]]:
    """Return the caption, and questions with answers: which digit is at each place, and how many there are."""
    named = [(g.digit, place(cell)) for g, cell in zip(picture.glyphs, picture.cells)]
    caption = ", ".join(f"{digit} {where}" for digit, where in named)
    questions = [(f"Which digit is {where}?", str(digit)) for digit, where in named]
    return caption, [*questions, ("How many digits are there?", NUMBERS[len(named)])]
