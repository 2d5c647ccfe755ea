"""Notes on a scene, which stand where a picture's visual tokens would in the texts of a language model."""

import math
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from blipren.training.quickstart.grounded_scenes import object_box
from blipren.training.quickstart.scenes import COLOURS, SHAPES, Scene
from blipren.training.quickstart.wording import place_answer, plural

PLACE_WAVES = (1, 2, 4)  # periods along a side
PLACE_WORDS = 4 * (1 + 2 * len(PLACE_WAVES))  # of a box
PLACE_BYTES = [chr(byte) for byte in range(174, 174 + PLACE_WORDS)]  # tokens of no text
PLACE_NOISE = 0.006  # shares of the side; a soft token is not exact either

# Colours and shapes that no scene has: texts about them teach that any colour goes with any shape.
MORE_COLOURS = tuple(
    "pink brown gray cyan golden silver beige teal maroon navy olive violet indigo crimson ivory bronze".split()
)
MORE_SHAPES = tuple("heart ring arrow hexagon moon cube cone leaf cloud bell key lamp boat tree house fish".split())


class Note(NamedTuple):
    """What one position before the prompt holds: words, and the box of an object as shares of the side.

    A `written` note is text as a prompt is: it takes a position for each token.
    """

    text: str
    box: tuple[float, ...] | None = None
    written: bool = False


class Cell(NamedTuple):
    """A place without an object."""

    row: int
    column: int


EMPTY_CELLS = [Cell(row, column) for row in range(3) for column in range(3)]


def write_notes(scene: Scene, rng: random.Random, shuffled: float, placed: bool = True) -> list[Note]:
    """Return notes on a scene, one for each position before the prompt.

    The embeddings of the words of a position are summed. Each object is one position, " large red circle top left", as a
    soft token stands for an object or a region. The positions are mostly in reading order; some objects come twice, and
    some positions say that a place is empty, " nothing bottom".

    Args:
        shuffled: share of the scenes whose objects are in any order.
        placed: whether words say where an object is, beside its box.
    """
    objects = list(scene.objects)
    if rng.random() < shuffled:
        rng.shuffle(objects)
    most = rng.choice((1, 1, 1, 2))
    notes = []
    for o in objects:
        place = f" {place_answer(o)}" if placed else ""
        notes += [Note(f" {o.size} {o.colour} {o.shape}{place}", object_box(o))] * rng.randint(1, most)
    taken = {(o.row, o.column) for o in objects}
    free = [f" {place_answer(cell)}" for cell in EMPTY_CELLS if (cell.row, cell.column) not in taken]
    for _ in range(rng.randrange(17 - len(notes))):
        notes.insert(rng.randint(0, len(notes)), Note(rng.choice((" nothing", " nothing" + rng.choice(free)))))
    return notes


def place_weights(box: Sequence[float], rng: random.Random | None = None) -> list[float]:
    """Return the numbers that say where a box is: seven for each of x1, y1, x2, y2 (shares of the side).

    The first is the number itself, from -1 to 1; the others are cosine and sine of three waves.

    Args:
        rng: of the noise on each of x1, y1, x2, y2; None for none.
    """
    weights = []
    for share in box:
        share += rng.gauss(0, PLACE_NOISE) if rng else 0.0
        weights.append(2 * share - 1)
        angles = [2 * math.pi * wave * share for wave in PLACE_WAVES]
        weights += [function(angle) for angle in angles for function in (math.cos, math.sin)]
    return weights


def place_words(tokenizer, box: tuple[float, ...], rng: random.Random) -> list[tuple[int, float]]:
    """Return tokens and weights whose weighted embeddings say where a box is, to about a hundredth of the side.

    The weights are those of `place_weights`, of tokens that no text uses. A soft token can hold such a sum, but not write
    digits.
    """
    return list(zip(tokenizer.convert_tokens_to_ids(PLACE_BYTES), place_weights(box, rng)))


def rename(texts: list[str], rng: random.Random) -> list[str]:
    """Return the texts with some colours and shapes replaced by ones that no scene has."""
    share = rng.random()
    swaps = {c: n for c, n in zip(COLOURS, rng.sample(MORE_COLOURS, len(COLOURS))) if rng.random() < share}
    swaps |= {s: n for s, n in zip(SHAPES, rng.sample(MORE_SHAPES, len(SHAPES))) if rng.random() < share}
    swaps |= {plural(s): n + "s" for s, n in swaps.items() if s in SHAPES}
    pattern = re.compile(rf"\b({'|'.join(swaps)})\b")
    texts = [pattern.sub(lambda m: swaps[m[1]], t) for t in texts] if swaps else texts
    return [re.sub(r"\ban? (?=(\w))", lambda m: "an " if m[1] in "aeiou" else "a ", t) for t in texts]


def rename_document(
    notes: list[Note], pairs: list[tuple[str, str]], rng: random.Random
) -> tuple[list[Note], list[tuple[str, str]]]:
    """Return notes and pairs with some colours and shapes replaced by ones that no scene has, the same ones in all."""
    texts = rename([note.text for note in notes] + [t for pair in pairs for t in pair], rng)
    notes = [note._replace(text=text) for note, text in zip(notes, texts)]
    texts = texts[len(notes) :]
    return notes, list(zip(texts[::2], texts[1::2]))
