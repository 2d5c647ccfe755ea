"""Conversations about drawn scenes: several questions about one, and questions about two at once.

The questions about two pictures (`PAIR_QUESTIONS`) are balanced: who sees one picture guesses the answer no better than who
sees none.
"""

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from blipren.training.quickstart.scenes import (
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    draw_scene,
    held_out_reason,
    make_scene,
    place_in_cell,
    vary_colour,
)
from blipren.training.quickstart.wording import NUMBERS, place_answer, write_captions, write_questions

DIFFERENCES = ("color", "shape", "size", "place")
PAIR_QUESTIONS = {
    "different": "What is different?",
    "same number": "Do both pictures have the same number of shapes?",
    "more": "Which picture has more shapes?",
}
LEFT, RIGHT = "Left picture:", " Right picture:"  # in front of the pictures of a pair
TURNS = 4  # of a conversation about one scene


@dataclass(frozen=True)
class Part:
    """Numbers of scenes and of pairs of one group for one split of the data."""

    split: str
    group: str
    scenes: int
    pairs: int


DEFAULT_PARTS = (
    Part("train", "seen", 4000, 6000),
    Part("validation", "seen", 100, 100),
    Part("test", "seen", 200, 200),
    Part("test", "unseen", 200, 200),
)


def write_turns(scene: Scene, rng: random.Random, held_out: bool) -> list[tuple[str, str]]:
    """Return questions and answers of a conversation about a scene. Some refer to the object of the question before."""
    turns = write_questions(scene, rng, held_out=held_out)
    named = [o for o in scene.objects if sum(p.combination == o.combination for p in scene.objects) == 1]
    rng.shuffle(named)
    for o in named[:1]:
        follow = rng.choice([("Where is it?", place_answer(o)), ("Is it small or large?", o.size)])
        turns = turns[: TURNS - 2]
        place = rng.randint(0, len(turns))
        turns[place:place] = [(f"Is there a {o.colour} {o.shape}?".replace("a orange", "an orange"), "yes"), follow]
    return turns[:TURNS]


def change_scene(scene: Scene, what: str, rng: random.Random) -> Scene:
    """Return the scene with one attribute of one object changed: its `color`, `shape`, `size` or `place`."""
    objects = list(scene.objects)
    index = rng.randrange(len(objects))
    o = objects[index]
    if what == "color":
        colour = rng.choice([c for c in COLOURS if c != o.colour])
        new = replace(o, colour=colour, rgb=vary_colour(colour, rng))
    elif what == "shape":
        new = replace(o, shape=rng.choice([s for s in SHAPES if s != o.shape]))
    elif what == "size":
        size = next(s for s in SIZES if s != o.size)
        x, y, radius = place_in_cell(o.row, o.column, size, rng)
        new = replace(o, size=size, x=x, y=y, radius=radius)
    else:
        taken = {(p.row, p.column) for p in objects}
        row, column = rng.choice([(r, c) for r in range(3) for c in range(3) if (r, c) not in taken])
        x, y = o.x + (column - o.column) / 3, o.y + (row - o.row) / 3
        new = replace(o, row=row, column=column, x=round(x, 4), y=round(y, 4))
    objects[index] = new
    return Scene(tuple(sorted(objects, key=_reading_order)), scene.ground)


def _reading_order(o: SceneObject) -> tuple[int, int]:
    return o.row, o.column


def changed_scene(scene: Scene, what: str, rng: random.Random, group: str) -> Scene:
    """Return a changed scene that holds out what its group does."""
    while True:
        changed = change_scene(scene, what, rng)
        if (held_out_reason(changed) is None) == (group == "seen") or group == "unseen":
            return changed


def answer_pair(kind: str, first: Scene, second: Scene) -> str:
    """Return the answer to a question about two scenes; of `different`, what differs is not looked for."""
    a, b = len(first.objects), len(second.objects)
    if kind == "same number":
        return "yes" if a == b else "no"
    return "left" if a > b else "right" if b > a else "equal"


def draw_pair_kind(rng: random.Random) -> str:
    """Return a kind of question about two pictures; half of them are `different`."""
    return rng.choice(("different", "different", "same number", "more"))


def draw_counts(kind: str, rng: random.Random, numbers: tuple[int, ...] = (1, 2, 3)) -> tuple[int, int]:
    """Return numbers of shapes of two pictures, such that one of them tells nothing about the answer.

    Of `same number`, half are equal. Of `more`, the numbers differ by one at most, and all such pairs are equally likely:
    the likeliest answer is right in 3 of 7 pairs, with and without one of the numbers.
    """
    pairs = [(a, b) for a in numbers for b in numbers]
    if kind == "same number":
        equal = rng.random() < 0.5
        return rng.choice([(a, b) for a, b in pairs if (a == b) == equal])
    return rng.choice([(a, b) for a, b in pairs if abs(a - b) < 2])


def draw_scene_of(seed: int, index: int, number: int, part: int) -> Scene:
    """Return a scene with a number of objects. Each `part` of a text about several scenes draws others."""
    for attempt in itertools.count():
        scene = make_scene(seed, 10**8 * part + 100 * index + attempt)
        if len(scene.objects) == number:
            return scene


def more_pair_turns(kind: str, left: Scene, right: Scene) -> list[tuple[str, str]]:
    """Return questions with answers about each picture of a pair, which teach to compare them. For training alone."""
    if kind != "different":
        sides = (("left", left), ("right", right))
        return [(f"How many shapes are on the {side}?", NUMBERS[len(scene.objects)]) for side, scene in sides]
    turns = []
    for side, scene, other in (("left", left, right), ("right", right, left)):
        (o,) = set(scene.objects) - set(other.objects)
        turns.append((f"What is only on the {side}?", f"{o.size} {o.colour} {o.shape} {place_answer(o)}"))
    return turns


def list_objects(scene: Scene) -> str:
    """Return what stands in a scene, in reading order: "small red circle top left, large blue cross center"."""
    return ", ".join(f"{o.size} {o.colour} {o.shape} {place_answer(o)}" for o in scene.objects)


def best_guess_share(answers: list[tuple[object, str]]) -> float:
    """Return the share of answers that are right when the likeliest answer to what is known is always given.

    Args:
        answers: what is known of each (the question, or it and one of the pictures), and the right answer.
    """
    counts: dict[object, dict[str, int]] = {}
    for known, answer in answers:
        own = counts.setdefault(known, {})
        own[answer] = own.get(answer, 0) + 1
    return sum(max(own.values()) for own in counts.values()) / len(answers)


def _messages(turns: list[tuple[str, str]], images: int) -> list[dict]:
    messages = []
    for number, (question, answer) in enumerate(turns):
        content: list[dict] = [{"type": "text", "text": question}]
        if number == 0 and images == 1:
            content = [{"type": "image"}, *content]
        elif number == 0:
            content = [
                part for text in (LEFT, RIGHT) for part in ({"type": "text", "text": text}, {"type": "image"})
            ] + [{"type": "text", "text": " " + question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def iterate_rows(seed: int, parts: tuple[Part, ...] = DEFAULT_PARTS) -> Iterator[tuple[dict, dict[str, Scene]]]:
    """Yield rows of conversations, each with the scenes of its images that are new, by file name."""
    offset = 0
    for part in parts:
        scenes = {i: make_scene(seed, i, part.group) for i in range(offset, offset + part.scenes)}
        names = {i: f"images/{part.group}-{i:06d}.png" for i in scenes}
        by_count: dict[int, list[int]] = {}
        for i, scene in scenes.items():
            by_count.setdefault(len(scene.objects), []).append(i)
        shared = {"split": part.split, "group": part.group}
        for i, scene in scenes.items():
            rng = random.Random(f"{seed}/turns/{part.group}/{i}")
            turns = write_turns(scene, rng, part.group == "unseen")
            row = {"id": f"{part.group}-{i}", "image": [names[i]], "messages": _messages(turns, 1)}
            yield row | {"captions": write_captions(scene, rng), "kind": "scene"} | shared, {names[i]: scene}
        for k in range(part.pairs):
            rng = random.Random(f"{seed}/pair/{part.group}/{offset + k}")
            kind = draw_pair_kind(rng)
            new: dict[str, Scene] = {}
            if kind == "different":
                first, answer = rng.choice(sorted(scenes)), rng.choice(DIFFERENCES)
                name = f"images/{part.group}-{offset + k:06d}-changed.png"
                new[name] = changed_scene(scenes[first], answer, rng, part.group)
                images = [names[first], name]
                rng.shuffle(images)
                pair = [(scenes[first], new[name])[n != names[first]] for n in images]
            else:
                first, second = (rng.choice(by_count[n]) for n in draw_counts(kind, rng, tuple(sorted(by_count))))
                images, pair = [names[first], names[second]], [scenes[first], scenes[second]]
                answer = answer_pair(kind, *pair)
            turns = [(PAIR_QUESTIONS[kind], answer)]
            if part.split == "train":
                turns += more_pair_turns(kind, *pair)
            row = {"id": f"pair-{part.group}-{offset + k}", "image": images, "kind": kind}
            yield row | {"messages": _messages(turns, 2), "captions": []} | shared, new
        offset += max(part.scenes, part.pairs)


def write_conversations(folder: Path, seed: int, parts: tuple[Part, ...] = DEFAULT_PARTS) -> Path:
    """Write an image folder and `conversations.jsonl` in it, which `blipren embed` reads. Returns that file."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    path = folder / "conversations.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row, scenes in iterate_rows(seed, parts):
            for name, scene in scenes.items():
                draw_scene(scene).save(folder / name, compress_level=1)
            file.write(json.dumps(row) + "\n")
    return path
