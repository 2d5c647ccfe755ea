"""Scenes of coloured shapes: drawn from a seed, the same on every machine.

A scene has one to three objects on a plain ground. Each object is in a cell of a 3 x 3 grid, so that every position and
relation that a caption may state is either true or false (`truth.py` checks them). Some combinations of colour and shape,
and some pairs of combinations, are held out: only scenes of the group "unseen" have them, and neither the small towers nor
a bridge is ever trained on one.
"""

import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import cos, pi, sin
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 210, 40),
    "purple": (140, 60, 170),
    "orange": (240, 135, 30),
    "black": (25, 25, 25),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
SIZES = {"small": 0.105, "large": 0.155}  # radius as a share of the image's side
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "middle", "right")
IMAGE_SIZE = 96

HELD_OUT_COMBINATIONS = frozenset(
    {
        ("red", "star"),
        ("green", "triangle"),
        ("blue", "diamond"),
        ("yellow", "circle"),
        ("purple", "square"),
        ("orange", "cross"),
    }
)
HELD_OUT_PAIR_SHARE = 12  # one of this many pairs of combinations is held out


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One shape. `x`, `y` and `radius` are shares of the image's side; `rgb` is the colour as drawn."""

    colour: str
    shape: str
    size: str
    row: int
    column: int
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]

    @property
    def combination(self) -> tuple[str, str]:
        """Colour and shape."""
        return (self.colour, self.shape)


@dataclass(frozen=True)
class Scene:
    """Objects in reading order (top row first, left to right), and the ground's colour."""

    objects: tuple[SceneObject, ...]
    ground: tuple[int, int, int]

    def to_json(self) -> str:
        """Return the scene as the column `scene` of metadata.jsonl holds it."""
        return json.dumps({"objects": [asdict(o) for o in self.objects], "ground": self.ground})

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        """Read a scene that `to_json` wrote."""
        raw = json.loads(text)
        objects = tuple(SceneObject(**{**o, "rgb": tuple(o["rgb"])}) for o in raw["objects"])
        return cls(objects, tuple(raw["ground"]))

    def groups(self) -> list[list[SceneObject]]:
        """Return the objects grouped by colour, shape and size, in order of first appearance."""
        groups: dict[tuple[str, str, str], list[SceneObject]] = {}
        for o in self.objects:
            groups.setdefault((o.colour, o.shape, o.size), []).append(o)
        return list(groups.values())


def is_held_out_pair(first: tuple[str, str], second: tuple[str, str]) -> bool:
    """Whether two combinations of colour and shape are never in one training scene."""
    if first == second:
        return False
    key = " ".join(sorted((" ".join(first), " ".join(second))))
    return zlib.crc32(key.encode()) % HELD_OUT_PAIR_SHARE == 0


def held_out_reason(scene: Scene) -> str | None:
    """Return "combination" or "pair" for what is held out in the scene, or None."""
    combinations = {o.combination for o in scene.objects}
    if combinations & HELD_OUT_COMBINATIONS:
        return "combination"
    ordered = sorted(combinations)
    if any(is_held_out_pair(a, b) for i, a in enumerate(ordered) for b in ordered[i + 1 :]):
        return "pair"
    return None


def place_in_cell(row: int, column: int, size: str, rng: random.Random) -> tuple[float, float, float]:
    """Return x, y and radius of an object that stays inside its cell, as shares of the image's side."""
    radius = SIZES[size] * rng.uniform(0.95, 1.05)
    room = max(0.0, 1 / 6 - radius - 0.003)
    x = (column + 0.5) / 3 + rng.uniform(-room, room)
    y = (row + 0.5) / 3 + rng.uniform(-room, room)
    return round(x, 4), round(y, 4), round(radius, 4)


def vary_colour(colour: str, rng: random.Random) -> tuple[int, ...]:
    """Return a colour as it is drawn: near the one of `COLOURS`."""
    return tuple(min(255, max(0, c + rng.randint(-14, 14))) for c in COLOURS[colour])


def _random_scene(rng: random.Random) -> Scene:
    """Return any scene, held out or not. Objects of one colour and shape have one size, so that counts are unambiguous."""
    # Number of objects in each group of identical ones.
    layout = rng.choices(((1,), (1, 1), (1, 1, 1), (2,), (3,), (2, 1)), weights=(20, 34, 22, 9, 6, 9))[0]
    kinds: list[tuple[str, str, str]] = []
    while len(kinds) < len(layout):
        kind = (rng.choice(tuple(COLOURS)), rng.choice(SHAPES), rng.choice(tuple(SIZES)))
        if kind[:2] not in [k[:2] for k in kinds]:
            kinds.append(kind)
    cells = rng.sample([(row, column) for row in range(3) for column in range(3)], sum(layout))
    objects = []
    for count, (colour, shape, size) in zip(layout, kinds):
        for _ in range(count):
            row, column = cells.pop()
            x, y, radius = place_in_cell(row, column, size, rng)
            objects.append(
                SceneObject(
                    colour=colour,
                    shape=shape,
                    size=size,
                    row=row,
                    column=column,
                    x=x,
                    y=y,
                    radius=radius,
                    rgb=vary_colour(colour, rng),
                )
            )
    objects.sort(key=lambda o: (o.row, o.column))
    level = rng.randint(165, 195)
    return Scene(tuple(objects), tuple(level + rng.randint(-8, 8) for _ in range(3)))


def make_scene(seed: int, index: int, group: str = "seen") -> Scene:
    """Return scene number `index` of a seed.

    Args:
        group: "seen" has nothing held out; "unseen" has a held-out combination (even index) or a held-out pair of
            combinations that are themselves seen (odd index).
    """
    if group not in ("seen", "unseen"):
        raise ValueError(f"group is {group!r}: use 'seen' or 'unseen'")
    wanted = None if group == "seen" else ("combination", "pair")[index % 2]
    rng = random.Random(f"{seed}/{group}/{index}")
    while True:
        scene = _random_scene(rng)
        if held_out_reason(scene) == wanted:
            return scene


def outline(o: SceneObject, side: int) -> list[tuple[float, float]]:
    """Return the corners in pixels of any shape but the circle."""
    x, y, r = o.x * side, o.y * side, o.radius * side
    if o.shape == "square":
        h = 0.86 * r
        return [(x - h, y - h), (x + h, y - h), (x + h, y + h), (x - h, y + h)]
    if o.shape == "diamond":
        return [(x, y - r), (x + 0.8 * r, y), (x, y + r), (x - 0.8 * r, y)]
    if o.shape == "triangle":
        return [(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)]
    if o.shape == "cross":
        a, b = r, 0.34 * r
        return [
            (x - b, y - a), (x + b, y - a), (x + b, y - b), (x + a, y - b), (x + a, y + b), (x + b, y + b),
            (x + b, y + a), (x - b, y + a), (x - b, y + b), (x - a, y + b), (x - a, y - b), (x - b, y - b),
        ]  # fmt: skip
    if o.shape == "star":
        radii = (1.08 * r, 0.45 * r)
        return [(x + radii[k % 2] * sin(k * pi / 5), y - radii[k % 2] * cos(k * pi / 5)) for k in range(10)]
    raise ValueError(f"shape is {o.shape!r}: use one of {', '.join(SHAPES)}")


def draw_scene(scene: Scene, side: int = IMAGE_SIZE) -> Image.Image:
    """Draw a scene as an RGB image of `side` x `side` pixels. It is drawn larger and averaged."""
    scale = 3 if side <= 128 else 2
    image = Image.new("RGB", (side * scale, side * scale), scene.ground)
    pen = ImageDraw.Draw(image)
    for o in scene.objects:
        if o.shape == "circle":
            box = [(o.x - o.radius), (o.y - o.radius), (o.x + o.radius), (o.y + o.radius)]
            pen.ellipse([v * side * scale for v in box], fill=o.rgb)
        else:
            pen.polygon(outline(o, side * scale), fill=o.rgb)
    return image.reduce(scale)


@dataclass(frozen=True)
class Split:
    """A number of scenes of one group for one split of the data."""

    name: str
    group: str
    count: int


DEFAULT_SPLITS = (
    Split("train", "seen", 6000),
    Split("validation", "seen", 200),
    Split("test", "seen", 250),
    Split("test", "unseen", 250),
)


def iterate_rows(seed: int, splits: tuple[Split, ...] = DEFAULT_SPLITS) -> Iterator[dict]:
    """Yield the row of each image: split, group, scene, captions, questions, answers. Splits share no scene number."""
    from blipren.training.quickstart.wording import write_captions, write_questions

    offset = 0
    for split in splits:
        for index in range(offset, offset + split.count):
            scene = make_scene(seed, index, split.group)
            rng = random.Random(f"{seed}/words/{split.group}/{index}")
            pairs = write_questions(scene, rng, held_out=split.group == "unseen")
            yield {
                "file_name": f"images/scene-{index:06d}.png",  # datasets would take a split's name in the path for the split
                "captions": write_captions(scene, rng),
                "questions": [q for q, _ in pairs],
                "answers": [a for _, a in pairs],
                "split": split.name,
                "group": split.group,
                "scene": scene.to_json(),
            }
        offset += split.count


def write_scenes(
    folder: Path, seed: int, splits: tuple[Split, ...] = DEFAULT_SPLITS, rows: Callable = iterate_rows
) -> int:
    """Write an image folder with `metadata.jsonl` that `datasets.load_dataset` reads. Returns the number of images.

    The metadata comes last and is renamed when complete, so a folder that has it is complete.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    partial = folder / "metadata.jsonl.partial"
    count = 0
    with partial.open("w", encoding="utf-8") as file:
        for row in rows(seed, splits):
            draw_scene(Scene.from_json(row["scene"])).save(folder / row["file_name"], compress_level=1)
            file.write(json.dumps(row) + "\n")
            count += 1
    partial.replace(folder / "metadata.jsonl")
    return count
