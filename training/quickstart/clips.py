"""Clips of shapes that move, appear and vanish, and of digits shown one after the other, with questions about them."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from blipren.training.quickstart.glyphs import Glyph, draw_glyphs, random_ink
from blipren.training.quickstart.scenes import (
    COLOURS,
    HELD_OUT_COMBINATIONS,
    IMAGE_SIZE,
    SHAPES,
    Scene,
    SceneObject,
    draw_scene,
)
from blipren.training.quickstart.wording import NUMBERS, article

SECONDS = 2.0
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
ORDINALS = ("one", "two", "three", "four")
KINDS = ("move", "order", "digits")
DIGITS = 4  # of a clip of digits


@dataclass(frozen=True)
class Clip:
    """A clip of one of the `KINDS`.

    Attributes:
        shapes: colour and shape of each: one that moves, or two or three of which each takes the place of the one before.
        direction: of the shape that moves.
        digits: shown one after the other.
        starts, ends: place of each shape at its first and last moment, as shares of the side.
        ground: its colour.
    """

    kind: str
    shapes: tuple[tuple[str, str], ...] = ()
    direction: str | None = None
    digits: tuple[int, ...] = ()
    starts: tuple[tuple[float, float], ...] = ()
    ends: tuple[tuple[float, float], ...] = ()
    ground: tuple[int, int, int] = (180, 180, 180)


def make_clip(seed: int, index: int) -> Clip:
    """Return clip number `index` of a seed."""
    rng = random.Random(f"{seed}/clips/{index}")
    kind = KINDS[index % len(KINDS)]
    level = rng.randint(165, 195)
    ground = tuple(level + rng.randint(-8, 8) for _ in range(3))
    if kind == "digits":
        return Clip(kind, digits=tuple(rng.randrange(10) for _ in range(DIGITS)), ground=ground)
    names: list[tuple[str, str]] = []
    while len(names) < (1 if kind == "move" else rng.choice((2, 2, 3))):
        name = (rng.choice(tuple(COLOURS)), rng.choice(SHAPES))
        if name not in HELD_OUT_COMBINATIONS and all(name[1] != other[1] for other in names):
            names.append(name)
    if kind == "order":
        places = tuple((rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8)) for _ in names)
        return Clip(kind, tuple(names), starts=places, ends=places, ground=ground)
    direction = rng.choice(tuple(DIRECTIONS))
    across, down = DIRECTIONS[direction]
    aside = rng.uniform(0.25, 0.75)  # on the axis that does not change
    near, far = rng.uniform(0.18, 0.3), rng.uniform(0.7, 0.82)
    start = (near if across > 0 else far, aside) if across else (aside, near if down > 0 else far)
    end = (far if across > 0 else near, aside) if across else (aside, far if down > 0 else near)
    return Clip(kind, tuple(names), direction, starts=(start,), ends=(end,), ground=ground)


def draw_moment(clip: Clip, share: float, side: int = IMAGE_SIZE) -> Image.Image:
    """Draw the clip at a share of its duration, from 0 to 1."""
    if clip.kind == "digits":
        digit = clip.digits[min(int(share * len(clip.digits)), len(clip.digits) - 1)]
        rng = random.Random(f"{clip.digits}/{clip.ground}")
        glyph = Glyph(
            digit, 0.5 + rng.uniform(-0.1, 0.1), 0.5 + rng.uniform(-0.1, 0.1), 0.5, random_ink(rng, clip.ground)
        )
        return draw_glyphs(Image.new("RGB", (4 * side, 4 * side), clip.ground), (glyph,)).reduce(4)
    shown = min(int(share * len(clip.shapes)), len(clip.shapes) - 1)
    inside = share * len(clip.shapes) - shown
    (x0, y0), (x1, y1) = clip.starts[shown], clip.ends[shown]
    colour, shape = clip.shapes[shown]
    x, y = x0 + (x1 - x0) * inside, y0 + (y1 - y0) * inside
    cell = {"row": int(3 * y), "column": int(3 * x)}
    shape = SceneObject(colour=colour, shape=shape, size="large", **cell, x=x, y=y, radius=0.15, rgb=COLOURS[colour])
    return draw_scene(Scene((shape,), clip.ground), side)


def draw_clip(clip: Clip, frames: int) -> list[Image.Image]:
    """Draw frames at equal steps of time."""
    return [draw_moment(clip, (number + 0.5) / frames) for number in range(frames)]


def write_clips(folder: Path, seed: int, splits: dict[str, int], frames: int = 12) -> int:
    """Write a folder of animated images with `metadata.jsonl`: `splits` has the number of clips of each split."""
    (folder / "clips").mkdir(parents=True)
    lines = []
    for split, count in splits.items():
        for index in range(len(lines), len(lines) + count):
            clip = make_clip(seed, index)
            name = f"clips/{index:05d}.webp"
            first, *rest = draw_clip(clip, frames)
            first.save(
                folder / name,
                save_all=True,
                append_images=rest,
                duration=round(1000 * SECONDS / frames),
                lossless=True,
                method=0,
            )
            caption, questions = write_clip_texts(clip)
            row = {"video": name, "caption": caption, "split": split, "group": clip.kind}
            row |= {"questions": [q for q, _ in questions], "answers": [a for _, a in questions]}
            lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def clip_notes(clip: Clip) -> list[str]:
    """Return what soft tokens may say of a clip: " two blue square" for the second shape, " three 7" for the third digit."""
    if clip.kind == "digits":
        return [f" {ORDINALS[k]} {digit}" for k, digit in enumerate(clip.digits)]
    if clip.kind == "move":
        colour, shape = clip.shapes[0]
        return [f" {colour} {shape}", f" {clip.direction}"]
    return [f" {ORDINALS[k]} {colour} {shape}" for k, (colour, shape) in enumerate(clip.shapes)]


def write_clip_texts(clip: Clip) -> tuple[str, list[tuple[str, str]]]:
    """Return the caption, and questions with answers: about direction, order and number, or the digits."""
    names = [" ".join(name) for name in clip.shapes]
    if clip.kind == "digits":
        digits = " ".join(map(str, clip.digits))
        return f"the digits {digits}", [("Which digits are shown?", digits)]
    number = ("How many shapes are there?", NUMBERS[len(names)])
    if clip.kind == "move":
        question = "Which way does the shape move?"
        return f"{article(names[0])} moves {clip.direction}", [(question, clip.direction), number]
    questions = [
        ("Which shape comes first?", clip.shapes[0][1]),
        ("Which shape comes last?", clip.shapes[-1][1]),
        number,
    ]
    return ", then ".join(article(name) for name in names), questions
