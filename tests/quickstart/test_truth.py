"""The truth checker, on captions written by hand."""

import pytest

from blipren.training.quickstart.scenes import Scene, SceneObject
from blipren.training.quickstart.truth import judge_caption


def thing(size: str, colour: str, shape: str, row: int, column: int) -> SceneObject:
    return SceneObject(
        colour=colour, shape=shape, size=size, row=row, column=column, x=0.2, y=0.2, radius=0.1, rgb=(0, 0, 0)
    )


ONE = Scene((thing("large", "red", "circle", 0, 0),), (180, 180, 180))
TWO = Scene((thing("large", "red", "circle", 0, 0), thing("small", "blue", "square", 1, 2)), (180, 180, 180))
THREE = Scene(
    (
        thing("small", "green", "star", 0, 1),
        thing("large", "red", "circle", 1, 1),
        thing("small", "orange", "cross", 2, 2),
    ),
    (180, 180, 180),
)
PAIR = Scene(
    (
        thing("small", "green", "star", 0, 0),
        thing("small", "green", "star", 0, 2),
        thing("large", "orange", "cross", 2, 2),
    ),
    (180, 180, 180),
)

TRUE = [
    (ONE, "a red circle"),
    (ONE, "A large red circle."),
    (ONE, "there is one large red circle in the top left corner of the picture"),
    (ONE, "a red circle on the left"),
    (TWO, "a red circle and a blue square"),
    (TWO, "a blue square and a red circle"),
    (TWO, "a large red circle to the left of a small blue square"),
    (TWO, "the blue square is below the red circle"),
    (TWO, "two shapes: a red circle and a blue square, and the square is to the right of the circle"),
    (TWO, "a red circle at the top and a blue square on the right side"),
    (THREE, "a green star, a red circle and an orange cross"),
    (THREE, "a red circle in the middle, a green star at the top and a small orange cross at the bottom right"),
    (THREE, "a green star above a red circle and an orange cross in the bottom right corner"),
    (PAIR, "two green stars and an orange cross"),
    (PAIR, "a pair of small green stars above a large orange cross"),
    (PAIR, "a green star, a green star and an orange cross"),
]
FALSE = [
    (ONE, "a blue circle", "wrong colour"),
    (ONE, "a red square", "wrong shape"),
    (ONE, "a small red circle", "wrong size"),
    (ONE, "a red circle on the right", "wrong place"),
    (ONE, "a red circle in the top right corner", "half of the place is wrong"),
    (ONE, "a red circle and a blue square", "an object that is not there"),
    (ONE, "two red circles", "wrong count"),
    (TWO, "a blue circle and a red square", "colours exchanged"),
    (TWO, "a small red circle and a large blue square", "sizes exchanged"),
    (TWO, "a red circle to the right of a blue square", "wrong relation"),
    (TWO, "a red circle below a blue square", "wrong relation"),
    (TWO, "three shapes: a red circle and a blue square", "wrong total"),
    (THREE, "a green star to the left of a red circle and an orange cross", "same column: neither left nor right"),
    (PAIR, "two green stars on the left and an orange cross", "one of the two is on the right"),
    (PAIR, "three green stars and an orange cross", "wrong count"),
    (PAIR, "two large green stars and an orange cross", "wrong size"),
]
PARTIAL = [
    (TWO, "a red circle", 0.5, 0),
    (TWO, "a red circle and a blue star", 0.75, 1),
    (THREE, "a green star and a red circle", 4 / 6, 0),
    (PAIR, "a green star and an orange cross", 4 / 6, 0),
    (TWO, "a red circle, a blue square and a green star", 1.0, 1),
]
VAGUE = [
    "",
    "shapes",
    "a picture",
    "a red shape",
    "a circle",
    "some colorful shapes",
    "there are two shapes",
    "red",
    ".",
]
UNREADABLE = [
    "a shiny red circle",
    "no red circle",
    "a red circle without a blue square",
    "a red circle to the left of",
    "to the left of a red circle",
    "a red circles",
    "a red circle at the top bottom",
    "a red red circle",
]


@pytest.mark.parametrize("scene, caption", TRUE)
def test_true(scene, caption):
    verdict = judge_caption(caption, scene)
    assert verdict.true, verdict.problems
    assert verdict.attribute_recall == 1
    assert verdict.hallucinated == 0


@pytest.mark.parametrize("scene, caption, why", FALSE)
def test_false(scene, caption, why):
    verdict = judge_caption(caption, scene)
    assert not verdict.true, why
    assert verdict.problems


@pytest.mark.parametrize("scene, caption, recall, hallucinated", PARTIAL)
def test_partly_right_is_not_true(scene, caption, recall, hallucinated):
    verdict = judge_caption(caption, scene)
    assert not verdict.true
    assert verdict.attribute_recall == pytest.approx(recall)
    assert verdict.hallucinated == hallucinated


@pytest.mark.parametrize("caption", VAGUE)
def test_empty_and_vague_are_not_true(caption):
    for scene in (ONE, TWO, THREE, PAIR):
        verdict = judge_caption(caption, scene)
        assert not verdict.true
        assert verdict.attribute_recall < 1


@pytest.mark.parametrize("caption", UNREADABLE)
def test_what_cannot_be_read_is_not_true(caption):
    assert not judge_caption(caption, ONE).true


def test_long_rambling_is_judged_quickly():
    verdict = judge_caption("a red circle " * 60, TWO)
    assert not verdict.true
    assert verdict.mentioned == 60
    assert verdict.hallucinated == 59
