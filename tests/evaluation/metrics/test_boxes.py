"""Scores of boxes and points against values worked out by hand, and against torchvision's formula where it is simple."""

import numpy as np
import pytest

from blipren.training.evaluation.metrics.boxes import (
    PlaceAnswer,
    box_iou,
    box_reward,
    matched_ious,
    place_scores,
    points_inside,
)

A, B, C = (0, 0, 100, 100), (50, 0, 150, 100), (500, 500, 600, 600)


def ask(kind, truth, text, boxes=(), image="1"):
    return PlaceAnswer(image, kind, "?", truth, tuple(boxes), text)


def test_intersection_over_union():
    assert box_iou([A], [A, B, C]).tolist() == [[1.0, pytest.approx(1 / 3), 0.0]]
    rng = np.random.default_rng(0)
    boxes = np.sort(rng.integers(0, 60, (40, 2, 2)), axis=1).reshape(40, 4) + [0, 0, 1, 1]
    for a, b in zip(boxes[:20], boxes[20:]):
        cells = [{(x, y) for x in range(p[0], p[2]) for y in range(p[1], p[3])} for p in (a, b)]
        assert box_iou([a], [b])[0, 0] == pytest.approx(len(cells[0] & cells[1]) / len(cells[0] | cells[1]))


def test_boxes_are_matched_one_to_one():
    """The greedy choice, A with B's neighbour, would leave a smaller sum."""
    left, right = (0, 0, 100, 100), (60, 0, 160, 100)
    between = (25, 0, 125, 100)
    found = matched_ious([between, left], [left, right])
    assert (
        sorted(found) == sorted([box_iou([between], [right])[0, 0], 1.0])
        and sum(found) > box_iou([between], [left])[0, 0] + box_iou([left], [right])[0, 0]
    )
    assert matched_ious([], [A]) == [] and matched_ious([A], []) == []


def test_the_reward():
    truth = f"{list(A)}, {list(C)}"
    assert box_reward(f"{list(C)} and {list(A)}", truth) == 1
    assert box_reward(f"{list(A)}", truth) == 0.5
    assert box_reward(f"{list(A)}, {list(C)}, {list(B)}, [1, 2]", truth) == pytest.approx(2 / 3)
    assert box_reward(f"{list(A)}, {list(C)}, [1, 2, 3]", truth) == pytest.approx(2 / 3)
    assert box_reward(f"{list(B)}", f"{list(A)}") == pytest.approx(1 / 3)
    assert box_reward("there is none", truth) == 0
    assert box_reward("Not in the picture.", "not in the picture") == 1
    assert box_reward(f"{list(A)}", "not in the picture") == 0


def test_scores():
    answers = [
        ask("find", str(list(A)), f"it is at {list(A)}", [A]),
        ask("find", str(list(A)), f"{list(B)}, {list(A)}", [A]),  # the first box counts
        ask("refer", str(list(C)), "no idea", [C], "2"),
        ask("find", f"{list(A)}, {list(C)}", f"{list(C)}, {list(B)}", [A, C]),
        ask("find", "not in the picture", "not in the picture"),
        ask("find", "not in the picture", str(list(A)), image="2"),
        ask("count", "2", "2."),
        ask("count", "2", "3", image="2"),
        ask("name", "red car", "Red car"),
        ask("point", "[50, 50]", "[99, 1]", [A]),
        ask("point", "[50, 50], [550, 550]", "[50, 50], [60, 60]", [A, C], "2"),
        ask("caption", f"a cup {list(A)} and a dog {list(C)}", f"a cup {list(A)} and a cat {list(C)} [3]", [A, C]),
    ]
    scores = place_scores(answers, resamples=50)
    assert scores["accuracy"] == pytest.approx(1 / 3) and scores["mean_iou"] == pytest.approx((1 + 1 / 3) / 3)
    assert scores["several_F1"] == 0.5 and scores["absent_refused"] == 0.5 and scores["false_finds"] == 0.5
    assert scores["counting"] == 0.5 and scores["naming"] == 1 and scores["pointing"] == 0.75
    assert scores["caption_F1"] == pytest.approx(2 * 1 / (3 + 2)) and scores["malformed"] == pytest.approx(1 / 12)
    assert scores["questions"] == {"find": 5, "refer": 1, "count": 2, "name": 1, "point": 2, "caption": 1}
    low, high = scores["intervals"]["accuracy"]
    assert 0 <= low <= scores["accuracy"] <= high <= 1


def test_fixed_answers():
    """The centre box has the mean size of the true boxes; no true box is a better fixed answer than the most frequent."""
    near = (10, 10, 110, 110)
    answers = [ask("find", str(list(box)), "", [box]) for box in (A, near, C)]
    answers += [ask("count", n, "") for n in "112"] + [ask("find", "not in the picture", "not in the picture")]
    scores = place_scores(answers, resamples=5)
    assert scores["most_frequent_box"]["accuracy"] == pytest.approx(2 / 3) and scores["centre_box"]["accuracy"] == 0
    assert scores["centre_box"]["counting"] == pytest.approx(2 / 3)
    assert scores["centre_box"]["false_finds"] == 1 and "absent_refused" not in scores["centre_box"]
    (only,) = [ask("find", "[450, 450, 550, 550]", "", [(450, 450, 550, 550)])]
    assert place_scores([only], resamples=5)["centre_box"]["accuracy"] == 1


def test_points_are_matched_to_boxes_of_their_own():
    assert points_inside("[50, 50], [70, 50]", [A, B]) == 1  # both lie in B, one of them in A alone is not needed
    assert points_inside("[10, 50], [20, 50]", [A, B]) == 0.5
    assert points_inside("nothing", [A]) == 0
