"""Captions, and questions with answers, about a scene. All are true; objects come in reading order."""

import random

from blipren.training.quickstart.scenes import (
    COLOURS,
    HELD_OUT_COMBINATIONS,
    SHAPES,
    Scene,
    SceneObject,
    is_held_out_pair,
)

NUMBERS = {1: "one", 2: "two", 3: "three"}
PLACES = {
    (0, 0): ("in the top left corner", "at the top left"),
    (0, 1): ("at the top", "at the top"),
    (0, 2): ("in the top right corner", "at the top right"),
    (1, 0): ("on the left", "on the left"),
    (1, 1): ("in the middle", "in the center"),
    (1, 2): ("on the right", "on the right"),
    (2, 0): ("in the bottom left corner", "at the bottom left"),
    (2, 1): ("at the bottom", "at the bottom"),
    (2, 2): ("in the bottom right corner", "at the bottom right"),
}
CAPTIONS_PER_SCENE = 4
QUESTIONS_PER_SCENE = 5


def plural(shape: str) -> str:
    """Return the plural of a shape."""
    return shape + ("es" if shape == "cross" else "s")


def article(words: str) -> str:
    """Return the words with "a" or "an" in front."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def place(o, rng: random.Random | None = None) -> str:
    """Return the place of something with a `row` and a `column` as a phrase: "at the top left"."""
    forms = PLACES[(o.row, o.column)]
    return rng.choice(forms) if rng else forms[1]


def place_answer(o) -> str:
    """Return the place of something with a `row` and a `column` as an answer: "top left"."""
    words = place(o).split()[2:]
    return " ".join(words)


def relation(first: SceneObject, second: SceneObject) -> list[str]:
    """Return all relations of the first object to the second, by their rows and columns."""
    found = []
    if first.column != second.column:
        found.append("to the left of" if first.column < second.column else "to the right of")
    if first.row != second.row:
        found.append("above" if first.row < second.row else "below")
    return found


def _name(group: list[SceneObject], sizes: bool) -> str:
    """Return the name of a group of equal objects: "a large red circle", "two red circles"."""
    o = group[0]
    words = f"{o.size} {o.colour}" if sizes else o.colour
    if len(group) == 1:
        return article(f"{words} {o.shape}")
    return f"{NUMBERS[len(group)]} {words} {plural(o.shape)}"


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def write_captions(scene: Scene, rng: random.Random, count: int = CAPTIONS_PER_SCENE) -> list[str]:
    """Return `count` different captions. Each names every object with its colour and shape."""
    groups = scene.groups()
    singles = all(len(g) == 1 for g in groups)
    plain, sized = (_list([_name(g, sizes) for g in groups]) for sizes in (False, True))
    forms = [
        plain,
        sized,
        f"there {'are' if len(groups[0]) > 1 else 'is'} {rng.choice((plain, sized))}",
        f"a picture of {rng.choice((plain, sized))}",
    ]
    if len(scene.objects) > 1:
        forms.append(f"{NUMBERS[len(scene.objects)]} shapes: {plain}")
    if singles:
        for _ in range(2):
            sizes = rng.random() < 0.5
            forms.append(_list([f"{_name(g, sizes)} {place(g[0], rng)}" for g in groups]))
    if singles and len(groups) == 2:
        first, second = rng.sample(groups, 2)
        sizes = rng.random() < 0.5
        forms.append(f"{_name(first, sizes)} {rng.choice(relation(first[0], second[0]))} {_name(second, sizes)}")
    forms = list(dict.fromkeys(forms))
    if len(forms) < count:
        raise ValueError(f"only {len(forms)} different captions for {scene}: {count} were asked for")
    chosen = forms[:1] + rng.sample(forms[1:], count - 1)  # the plain wording is always included
    rng.shuffle(chosen)
    return chosen


def full_caption(scene: Scene) -> str | None:
    """Return a caption with size, colour, shape and place of every object, or None if a scene has equal objects."""
    groups = scene.groups()
    if any(len(group) > 1 for group in groups):
        return None
    return _list([f"{_name(group, sizes=True)} {place(group[0])}" for group in groups])


def _is_unique(scene: Scene, **attributes: str) -> bool:
    return sum(all(getattr(o, k) == v for k, v in attributes.items()) for o in scene.objects) == 1


def absent_combination(scene: Scene, rng: random.Random, held_out: bool) -> tuple[str, str] | None:
    """Return a combination that the scene does not have. Half of them share a colour or shape with one of its objects."""
    present = {o.combination for o in scene.objects}
    candidates = [
        (colour, shape)
        for colour in COLOURS
        for shape in SHAPES
        if (colour, shape) not in present
        and (held_out or (colour, shape) not in HELD_OUT_COMBINATIONS)
        and (held_out or not any(is_held_out_pair((colour, shape), p) for p in present))
    ]
    near = [c for c in candidates if any(c[0] == p[0] or c[1] == p[1] for p in present)]
    return rng.choice(near if near and rng.random() < 0.5 else candidates)


def write_questions(
    scene: Scene, rng: random.Random, held_out: bool = False, count: int = QUESTIONS_PER_SCENE
) -> list[tuple[str, str]]:
    """Return `count` questions with their answers, each of another kind; fewer if the scene has fewer kinds.

    Args:
        held_out: whether a question about an absent object may name a held-out combination. Never in training.
    """
    objects = scene.objects
    kinds: dict[str, list[tuple[str, str]]] = {k: [] for k in ("colour", "shape", "size", "place", "relation")}
    for o in objects:
        name = f"{o.colour} {o.shape}"
        if _is_unique(scene, shape=o.shape):
            kinds["colour"].append((f"What color is the {o.shape}?", o.colour))
        if _is_unique(scene, colour=o.colour):
            kinds["shape"].append((f"What is the {o.colour} shape?", o.shape))
        if _is_unique(scene, colour=o.colour, shape=o.shape):
            kinds["size"].append((f"Is the {name} small or large?", o.size))
            kinds["place"].append((f"Where is the {name}?", place_answer(o)))
    if all(len(g) == 1 for g in scene.groups()) and len(objects) > 1:
        first, second = rng.sample(objects, 2)
        true = relation(first, second)
        asked = rng.choice(true)
        if rng.random() < 0.5:
            asked = {
                "to the left of": "to the right of",
                "to the right of": "to the left of",
                "above": "below",
                "below": "above",
            }[asked]
        question = f"Is the {first.colour} {first.shape} {asked} the {second.colour} {second.shape}?"
        kinds["relation"].append((question, "yes" if asked in true else "no"))
    kinds["count"] = [("How many shapes are there?", NUMBERS[len(objects)])]
    group = rng.choice(scene.groups())
    kinds["count of"] = [
        (f"How many {group[0].colour} {plural(group[0].shape)} are there?", NUMBERS[len(group)]),
    ]
    if rng.random() < 0.5:
        colour, shape = rng.choice(objects).combination
        kinds["exists"] = [(f"Is there {article(colour)} {shape}?", "yes")]
    else:
        colour, shape = absent_combination(scene, rng, held_out)
        kinds["exists"] = [(f"Is there {article(colour)} {shape}?", "no")]
    picked = [rng.choice(pairs) for pairs in kinds.values() if pairs]
    return rng.sample(picked, min(count, len(picked)))
