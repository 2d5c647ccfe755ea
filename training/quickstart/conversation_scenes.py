"""Conversations about drawn scenes: several questions about one, and questions about two at once.

The questions about two pictures are balanced: what one picture shows says nothing about the answer, or as little as
possible. `PAIR_QUESTIONS` has them.
"""

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
)
from blipren.training.quickstart.wording import place_answer, write_captions, write_questions

DIFFERENCES = ("color", "shape", "size", "place")
PAIR_QUESTIONS = {
    "different": "What is different, the color, the shape, the size or the place?",
    "same number": "Do both pictures have the same number of shapes?",
    "more": "Which picture has more shapes?",
}
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
        new = replace(o, colour=colour, rgb=COLOURS[colour])
    elif what == "shape":
        new = replace(o, shape=rng.choice([s for s in SHAPES if s != o.shape]))
    elif what == "size":
        size = next(s for s in SIZES if s != o.size)
        new = replace(
            o, size=size, radius=SIZES[size], x=round((o.column + 0.5) / 3, 4), y=round((o.row + 0.5) / 3, 4)
        )
    else:
        taken = {(p.row, p.column) for p in objects}
        row, column = rng.choice([(r, c) for r in range(3) for c in range(3) if (r, c) not in taken])
        x, y = o.x + (column - o.column) / 3, o.y + (row - o.row) / 3
        new = replace(o, row=row, column=column, x=round(x, 4), y=round(y, 4))
    objects[index] = new
    return Scene(tuple(sorted(objects, key=_reading_order)), scene.ground)


def _reading_order(o: SceneObject) -> tuple[int, int]:
    return o.row, o.column


def _changed_pair(scene: Scene, what: str, rng: random.Random, group: str) -> Scene:
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
            words = ("Left picture:", " Right picture:")
            content = [part for text in words for part in ({"type": "text", "text": text}, {"type": "image"})] + [
                {"type": "text", "text": " " + question}
            ]
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
            first = rng.choice(sorted(scenes))
            kind = rng.choice(("different", "different", "same number", "more"))
            new: dict[str, Scene] = {}
            if kind == "different":
                answer = rng.choice(DIFFERENCES)
                name = f"images/{part.group}-{offset + k:06d}-changed.png"
                new[name] = _changed_pair(scenes[first], answer, rng, part.group)
                images = [names[first], name]
                rng.shuffle(images)
            else:
                number = len(scenes[first].objects)
                others = [n for n in by_count if n != number]
                equal = rng.random() < (1 / 2 if kind == "same number" or number != 2 else 1 / 3)
                second = rng.choice(by_count[number if equal else rng.choice(others)])
                images = [names[first], names[second]]
                answer = answer_pair(kind, scenes[first], scenes[second])
            row = {"id": f"pair-{part.group}-{offset + k}", "image": images, "kind": kind}
            yield row | {"messages": _messages([(PAIR_QUESTIONS[kind], answer)], 2), "captions": []} | shared, new
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
