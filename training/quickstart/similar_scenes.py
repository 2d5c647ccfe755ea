"""Preferences about drawn scenes: a true caption of a scene against a caption of a similar one, which is not true of it."""

import json
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from blipren.training.quickstart.scenes import COLOURS, SHAPES, Scene, SceneObject, Split, held_out_reason, make_scene
from blipren.training.quickstart.truth import judge_caption
from blipren.training.quickstart.wording import write_captions

PAIRS_PER_SCENE = 3
CROWDED = 0.7  # share of scenes that have three objects: a model of the quickstart errs most on these
CHANGES = ("copied", "copied", "colour", "shape", "missing", "added")
"""What a similar scene differs in. Most errors of the quickstart's model name one object twice and another not at all."""


def make_crowded_scene(seed: int, index: int) -> Scene:
    """Return scene number `index` of those of which most have three objects. Nothing in it is held out."""
    first = 10**8 + 100 * index
    if random.Random(f"{seed}/crowded/{index}").random() >= CROWDED:
        return make_scene(seed, first)
    return next(scene for scene in (make_scene(seed, first + k) for k in range(100)) if len(scene.objects) == 3)


def iterate_crowded_rows(seed: int, splits: tuple[Split, ...]) -> Iterator[dict]:
    """Yield rows of crowded scenes with captions, as `scenes.iterate_rows` does of others."""
    index = 0
    for split in splits:
        for _ in range(split.count):
            scene = make_crowded_scene(seed, index)
            captions = write_captions(scene, random.Random(f"{seed}/crowded words/{index}"))
            name = f"images/crowded-{index:06d}.png"
            yield {"file_name": name, "captions": captions, "split": split.name, "scene": scene.to_json()}
            index += 1


def similar_scene(scene: Scene, rng: random.Random) -> Scene:
    """Return the scene with one change, of those in `CHANGES`. It has one to three objects, and nothing in it is held out.

    Where an object is missing, its caption is false for what it leaves out: without such pairs, and without those that
    leave out an object by naming another twice, a model would learn that naming fewer objects is safe.
    """
    while True:
        objects, what = list(scene.objects), rng.choice(CHANGES)
        number = rng.randrange(len(objects))
        old, others = objects[number], [o for o in objects if o.combination != objects[number].combination]
        if what == "missing" and len(objects) > 1:
            found = objects[:number] + objects[number + 1 :]
        elif what == "added" and len(objects) < 3:
            taken = {(o.row, o.column) for o in objects}
            row, column = rng.choice([(r, c) for r in range(3) for c in range(3) if (r, c) not in taken])
            new = another(scene, old, rng.choice(list(COLOURS)), rng.choice(SHAPES))
            found = [*objects, replace(new, row=row, column=column)]
        elif what == "copied" and others:
            found = [*objects[:number], another(scene, old, *rng.choice(others).combination), *objects[number + 1 :]]
        elif what == "colour":
            near = [o.colour for o in others] if rng.random() < 0.5 else []
            colour = rng.choice(near or list(COLOURS))
            found = [*objects[:number], another(scene, old, colour, old.shape), *objects[number + 1 :]]
        elif what == "shape":
            near = [o.shape for o in others] if rng.random() < 0.5 else []
            found = [
                *objects[:number],
                another(scene, old, old.colour, rng.choice(near or SHAPES)),
                *objects[number + 1 :],
            ]
        else:
            continue
        found.sort(key=lambda o: (o.row, o.column))
        similar = Scene(tuple(found), scene.ground)
        if held_out_reason(similar) is None and _combinations(similar) != _combinations(scene):
            return similar


def another(scene: Scene, old: SceneObject, colour: str, shape: str) -> SceneObject:
    """Return an object in place of one of the scene. The scene is written about, never drawn: x, y, rgb are of no use."""
    # all objects of a combination have one size
    sizes = [o.size for o in scene.objects if o.combination == (colour, shape)]
    return replace(old, colour=colour, shape=shape, size=sizes[0] if sizes else old.size)


def _combinations(scene: Scene) -> list[tuple[str, str]]:
    return sorted(o.combination for o in scene.objects)


def write_pair(scene: Scene, seed: str) -> tuple[str, str]:
    """Return a true caption of a scene, and a caption of a similar scene that is not true of it, worded alike."""
    attempt = 0
    while True:
        rng = random.Random(f"{seed}/{attempt}")
        other = similar_scene(scene, rng)
        words = rng.random()
        chosen, rejected = (
            random.Random(words).choice(write_captions(s, random.Random(words))) for s in (scene, other)
        )
        if not judge_caption(rejected, scene).true:
            return chosen, rejected
        attempt += 1


def write_preferences(scenes: Path, folder: Path, seed: int, prompt: str) -> int:
    """Write an image folder of preferences about the scenes of another. Returns the number of pairs.

    Args:
        prompt: the question that the captions answer.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    pairs = []
    for row in map(json.loads, (scenes / "metadata.jsonl").read_text(encoding="utf-8").splitlines()):
        name, scene = row["file_name"], Scene.from_json(row["scene"])
        if not (folder / name).exists():
            os.link(scenes / name, folder / name)
        for number in range(PAIRS_PER_SCENE):
            chosen, rejected = write_pair(scene, f"{seed}/pair/{name}/{number}")
            pair = {"id": f"{name}/{number}", "file_name": name, "split": row["split"], "prompt": prompt}
            pairs.append(json.dumps(pair | {"chosen": chosen, "rejected": rejected}))
    (folder / "metadata.jsonl").write_text("\n".join(pairs) + "\n", encoding="utf-8")
    return len(pairs)
