"""Whether a caption is true of a scene. A caption is parsed into objects, places, relations and counts, then checked.

The check is strict: a caption is true if it names every object of the scene with its colour and shape, and if every size,
place, relation and count that it states holds. Empty and vague captions are not true. A caption with a word that the
parser does not know is not true either, since that word cannot be checked.
"""

import itertools
import re
from dataclasses import dataclass, field

from blipren.training.evaluation.judges import CaptionVerdict
from blipren.training.quickstart.scenes import COLOURS, SHAPES, SIZES, Scene, SceneObject

_SHAPES = {s: s for s in SHAPES} | {s + "s": s for s in SHAPES} | {"crosses": "cross"}
_ANYTHING = {"shape", "shapes", "object", "objects", "thing", "things"}
_COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "1": 1, "2": 2, "3": 3, "4": 4, "5": 5}
_PLACE_WORDS = {
    "top": ("row", 0), "upper": ("row", 0), "bottom": ("row", 2), "lower": ("row", 2),
    "left": ("column", 0), "right": ("column", 2),
    "middle": ("both", 1), "center": ("both", 1), "centre": ("both", 1),
}  # fmt: skip
_ABOVE = {"above": "above", "over": "above", "below": "below", "under": "below", "beneath": "below"}
_FILLER = set(
    "there is are and with a an the of in on at this that image picture scene shows show showing drawing it contains "
    "containing has , . ; :".split()
)
_PICTURE = {"picture", "image", "scene", "drawing"}


@dataclass
class Mention:
    """One noun phrase: "two large red circles on the left". What it does not state is None."""

    count: int = 1
    colour: str | None = None
    shape: str | None = None
    size: str | None = None
    row: int | None = None
    column: int | None = None

    def fits(self, o: SceneObject) -> bool:
        """Whether all that the phrase states holds for an object."""
        stated = ("colour", "shape", "size", "row", "column")
        return all(getattr(self, k) in (None, getattr(o, k)) for k in stated)


@dataclass
class ParsedCaption:
    """What a caption states. `relations` holds indices into `mentions`: (first, "left", second)."""

    mentions: list[Mention] = field(default_factory=list)
    relations: list[tuple[int, str, int]] = field(default_factory=list)
    totals: list[int] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def _parse_place(words: list[str], i: int) -> tuple[dict[str, int], int] | None:
    """A place phrase at `i`, such as "in the top left corner of the picture": row and column stated, next index."""
    if words[i] not in ("in", "on", "at", "to"):
        return None
    j = i + 1
    if j < len(words) and words[j] == "the":
        j += 1
    found: dict[str, int] = {}
    start = j
    while j < len(words) and words[j] in _PLACE_WORDS:
        axis, value = _PLACE_WORDS[words[j]]
        if axis == "both":  # "top middle" fixes the column; "middle" alone fixes both
            found.setdefault("row", value)
            found.setdefault("column", value)
        elif found.get(axis, value) not in (value, 1):
            return None  # "top bottom"
        else:
            found[axis] = value
        j += 1
    if j == start:
        return None
    if j < len(words) and words[j] in ("corner", "side", "edge", "half"):
        j += 1
    if words[j : j + 1] == ["of"]:
        if words[j + 1 : j + 2] == ["the"] and words[j + 2 : j + 3] and words[j + 2] in _PICTURE:
            return found, j + 3
        return None  # "on the left of the square": a relation
    return found, j


def _parse_relation(words: list[str], i: int) -> tuple[str, int] | None:
    """A relation at `i`, such as "to the left of" or "above": its name and the next index."""
    if words[i] in _ABOVE:
        return _ABOVE[words[i]], i + 1
    match = re.match(r"(?:(?:to|on) the )?(left|right) of ", " ".join(words[i : i + 5]) + " ")
    if match:
        return match[1], i + len(match[0].split())
    return None


def _parse_noun(words: list[str], i: int) -> tuple[Mention, bool, bool, int] | None:
    """Parse a noun phrase at `i`. Returns the mention, whether it has "the", whether it has a count, and the next index."""
    mention, definite, counted = Mention(), False, False
    if words[i] in ("a", "an", "the"):
        definite = words[i] == "the"
        i += 1
    if words[i : i + 2] == ["pair", "of"]:
        mention.count, counted, i = 2, True, i + 2
    elif i < len(words) and words[i] in _COUNTS:
        mention.count, counted, i = _COUNTS[words[i]], True, i + 1
    while i < len(words):
        word = words[i]
        if word in COLOURS and mention.colour is None:
            mention.colour = word
        elif word in SIZES and mention.size is None:
            mention.size = word
        elif word in _SHAPES or word in _ANYTHING:
            mention.shape = _SHAPES.get(word)
            several = mention.count > 1
            is_plural = word.endswith("s") and word != "cross"
            return (mention, definite, counted, i + 1) if several == is_plural else None
        else:
            return None
        i += 1
    return None


def parse_caption(caption: str) -> ParsedCaption:
    """Parse a caption from left to right. A place or relation belongs to the noun before it."""
    words = re.findall(r"[a-z]+|\d+|[^\sa-z\d]", caption.lower())
    parsed = ParsedCaption()
    current: int | None = None  # the mention that a place or relation belongs to
    pending: tuple[int, str] | None = None  # a relation whose second noun has not come yet
    i = 0
    while i < len(words):
        noun = _parse_noun(words, i)
        if noun:
            mention, definite, counted, i = noun
            bare = mention.shape is None and mention.colour is None and mention.size is None
            if bare and counted and pending is None:
                parsed.totals.append(mention.count)
                continue
            index = _earlier(parsed.mentions, mention) if definite else None
            if index is None:
                parsed.mentions.append(mention)
                index = len(parsed.mentions) - 1
            if pending:
                parsed.relations.append((*pending, index))
                pending = None
            current = index
            continue
        related = _parse_relation(words, i)
        where = _parse_place(words, i)
        if (related or where) and (current is None or pending):
            parsed.unknown.append(words[i])
            i += 1
        elif where:
            for axis, value in where[0].items():
                mention = parsed.mentions[current]
                if getattr(mention, axis) not in (None, value):
                    parsed.unknown.append(f"two places for one {mention.shape or 'shape'}")
                setattr(mention, axis, value)
            i = where[1]
        elif related:
            pending = (current, related[0])
            i = related[1]
        else:
            if words[i] not in _FILLER:
                parsed.unknown.append(words[i])
            i += 1
    if pending:
        parsed.unknown.append(f"nothing after {pending[1]!r}")
    return parsed


def _earlier(mentions: list[Mention], wanted: Mention) -> int | None:
    """Return the index of the last earlier mention that "the red circle" can refer to, if any."""
    for index in reversed(range(len(mentions))):
        mention = mentions[index]
        stated = ("colour", "shape", "size")
        if mention.count == wanted.count and all(getattr(wanted, k) in (None, getattr(mention, k)) for k in stated):
            return index
    return None


def _holds(first: SceneObject, name: str, second: SceneObject) -> bool:
    return {
        "left": first.column < second.column,
        "right": first.column > second.column,
        "above": first.row < second.row,
        "below": first.row > second.row,
    }[name]


def _expand(mentions: list[Mention]) -> list[int]:
    """Return for every named object the index of its mention."""
    return [k for k, m in enumerate(mentions) for _ in range(m.count)]


def _is_arrangement_true(parsed: ParsedCaption, scene: Scene) -> bool:
    """Whether the named objects match the scene's one to one, with everything that is stated about them."""
    named = _expand(parsed.mentions)
    if len(named) != len(scene.objects):
        return False
    for order in itertools.permutations(scene.objects):
        if not all(parsed.mentions[k].fits(o) for k, o in zip(named, order)):
            continue
        by_mention = {k: [o for j, o in zip(named, order) if j == k] for k in set(named)}
        if all(
            _holds(a, name, b)
            for first, name, second in parsed.relations
            for a in by_mention[first]
            for b in by_mention[second]
        ):
            return True
    return False


def _best_recall(mentions: list[Mention], objects: tuple[SceneObject, ...]) -> int:
    """Return the largest number of correct colours and shapes over all ways to match named objects with the scene's."""
    named = [mentions[k] for k in _expand(mentions)]
    best = {frozenset(): 0}  # used named objects -> attributes right so far
    for o in objects:
        following: dict[frozenset, int] = {}
        for used, right in best.items():
            options = [(used, right)]
            for k, m in enumerate(named):
                if k not in used:
                    options.append((used | {k}, right + (m.colour == o.colour) + (m.shape == o.shape)))
            for state, value in options:
                following[state] = max(value, following.get(state, -1))
        best = following
    return max(best.values())


def _count_hallucinated(mentions: list[Mention], objects: tuple[SceneObject, ...]) -> int:
    """Return the number of named objects that no object of the scene matches, in a maximum matching."""
    named = [mentions[k] for k in _expand(mentions)]
    owner: dict[int, int] = {}  # scene object -> named object

    def assign(k: int, tried: set[int]) -> bool:
        for j, o in enumerate(objects):
            stated = named[k]
            if j in tried or stated.colour not in (None, o.colour) or stated.shape not in (None, o.shape):
                continue
            tried.add(j)
            if j not in owner or assign(owner[j], tried):
                owner[j] = k
                return True
        return False

    return sum(not assign(k, set()) for k in range(len(named)))


def judge_caption(caption: str, scene: Scene) -> CaptionVerdict:
    """Check a caption against the scene that it describes."""
    parsed = parse_caption(caption)
    mentions = parsed.mentions
    problems = [f"cannot be read: {word}" for word in parsed.unknown]
    if not mentions:
        problems.append("names no object")
    if any(m.colour is None or m.shape is None for m in mentions):
        problems.append("names an object without its colour and shape")
    if any(total != len(scene.objects) for total in parsed.totals):
        problems.append(f"states {parsed.totals} shapes where there are {len(scene.objects)}")
    if mentions and not _is_arrangement_true(parsed, scene):
        problems.append("objects, sizes, places or relations do not match the scene")
    capped = mentions[:24]  # a very long caption is judged by its beginning
    return CaptionVerdict(
        true=not problems,
        attribute_recall=_best_recall(capped, scene.objects) / (2 * len(scene.objects)),
        hallucinated=_count_hallucinated(mentions, scene.objects),
        mentioned=len(_expand(mentions)),
        problems=tuple(problems),
    )
