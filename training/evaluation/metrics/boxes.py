"""Scores of boxes and points that a model writes, as RefCOCO has them, and those of answers that look at no image.

Boxes are compared in thousandths of the sides; intersection over union does not depend on the unit. Several boxes are
matched one to one so that the sum of their intersections over unions is largest (`scipy.optimize.linear_sum_assignment`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from blipren.grounding_blipren import NOT_FOUND, UNITS, read_places
from blipren.training.evaluation.metrics.bootstrap import Statistic, grouped_statistic, interval

THRESHOLD = 0.5


@dataclass(frozen=True)
class PlaceAnswer:
    """A question about places and what the model said.

    Attributes:
        kind: of `grounding.KINDS`. truth: the true answer. boxes: the true boxes in thousandths, also of a point question.
    """

    image: str
    kind: str
    question: str
    truth: str
    boxes: tuple[tuple[int, int, int, int], ...]
    text: str


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the intersection over union of boxes [n, 4] and [m, 4], x1 y1 x2 y2: [n, m]."""
    a, b = np.asarray(a, dtype=np.float64).reshape(-1, 4), np.asarray(b, dtype=np.float64).reshape(-1, 4)
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    shared = sides.clip(min=0).prod(axis=-1)
    areas = [(box[:, 2:] - box[:, :2]).prod(axis=-1) for box in (a, b)]
    return shared / (areas[0][:, None] + areas[1][None, :] - shared)


def assign(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and columns of the one-to-one assignment with the largest sum."""
    from scipy.optimize import linear_sum_assignment  # its import takes longer than most evaluations need

    return linear_sum_assignment(table, maximize=True)


def matched_ious(found: Sequence, true: Sequence) -> list[float]:
    """Return the intersections over unions of the best one-to-one matching of two lists of boxes."""
    if not len(found) or not len(true):
        return []
    table = box_iou(np.array(found), np.array(true))
    return table[assign(table)].tolist()


def box_reward(answer: str, truth: str) -> float:
    """Return how well an answer's boxes fit the true answer's, from 0 to 1, as a reward.

    It is the sum of the matched intersections over unions, divided by the larger number of boxes, so that a missing and an
    invented box cost the same. Where the truth has no box, the answer has to be the same text. Malformed boxes count as
    boxes that match nothing.
    """
    found, true = read_places(answer), read_places(truth)
    if not true.boxes:
        return float(_same(answer, truth))
    return sum(matched_ious(found.boxes, true.boxes)) / max(len(found.boxes) + found.malformed, len(true.boxes))


def _same(text: str, truth: str) -> bool:
    return text.strip().rstrip(".").casefold() == truth.casefold()


def first_iou(text: str, truth: Sequence[int]) -> float:
    """Return the intersection over union of the first box of a text and a true box; 0 without a box."""
    found = read_places(text).boxes
    return float(box_iou(np.array(found[0]), np.array(truth))[0, 0]) if found else 0.0


def points_inside(text: str, boxes: Sequence[Sequence[int]]) -> float:
    """Return the share of points that lie in a true box of their own, of the larger number of points and boxes."""
    points = read_places(text).points
    if not points:
        return 0.0
    x, y = np.array(points).T[..., None]
    x1, y1, x2, y2 = np.array(boxes).T
    inside = (x1 <= x) & (x <= x2) & (y1 <= y) & (y <= y2)
    return float(inside[assign(inside)].sum() / max(len(points), len(boxes)))


def _box_counts(text: str, boxes: Sequence, labels: Sequence[str] | None = None) -> tuple[int, int, int]:
    """Return numbers of right, found and true boxes. With labels, a right box has the right words in front, too."""
    found = read_places(text)
    table = box_iou(np.array(found.boxes), np.array(boxes)) >= THRESHOLD
    if labels is not None:
        table &= np.array(found.labels)[:, None] == np.array(labels)[None]
    right = int(table[assign(table)].sum())
    return right, len(found.boxes) + found.malformed, len(boxes)


def _f1(counts: Sequence[tuple[int, int, int]], images: Sequence[str]) -> Statistic:
    """Return F1 over all boxes, resampled by image."""
    sums: dict[str, np.ndarray] = {}
    for image, row in zip(images, counts, strict=True):
        sums[image] = sums.get(image, np.zeros(3)) + row
    return Statistic(np.array(list(sums.values())), lambda s: 2 * s[..., 0] / np.maximum(s[..., 1] + s[..., 2], 1))


def place_statistics(answers: Sequence[PlaceAnswer]) -> dict[str, Statistic]:
    """Return the statistics that the answers allow, by name; see docs/evaluation.md for what each means."""
    one = [a for a in answers if a.kind in ("find", "refer") and len(a.boxes) == 1]
    several = [a for a in answers if a.kind == "find" and len(a.boxes) > 1]
    absent = [a for a in answers if a.kind == "find" and not a.boxes]
    found: dict[str, Statistic] = {}

    def mean(name: str, chosen: Sequence[PlaceAnswer], score: Callable[[PlaceAnswer], float]) -> None:
        if chosen:
            found[name] = grouped_statistic([score(a) for a in chosen], [a.image for a in chosen])

    mean("accuracy", one, lambda a: first_iou(a.text, a.boxes[0]) >= THRESHOLD)
    mean("mean_iou", one, lambda a: first_iou(a.text, a.boxes[0]))
    if several:
        found["several_F1"] = _f1([_box_counts(a.text, a.boxes) for a in several], [a.image for a in several])
    mean("absent_refused", absent, lambda a: _same(a.text, NOT_FOUND))
    mean("false_finds", absent, lambda a: bool(read_places(a.text).boxes))
    mean("counting", [a for a in answers if a.kind == "count"], lambda a: _same(a.text, a.truth))
    mean("naming", [a for a in answers if a.kind == "name"], lambda a: _same(a.text, a.truth))
    pointed = [a for a in answers if a.kind == "point" and a.boxes]
    mean("pointing", pointed, lambda a: points_inside(a.text, a.boxes))
    captions = [a for a in answers if a.kind == "caption"]
    if captions:
        counts = [_box_counts(a.text, a.boxes, read_places(a.truth).labels) for a in captions]
        found["caption_F1"] = _f1(counts, [a.image for a in captions])
    mean("malformed", answers, lambda a: read_places(a.text).malformed > 0)
    return found


def blind_answers(answers: Sequence[PlaceAnswer]) -> dict[str, list[PlaceAnswer]]:
    """Return what fixed answers would be: `centre_box` and `most_frequent_box`.

    The centre box has the mean width and height of the true boxes. The most frequent box is the true box that, as the
    answer to everything, reaches the highest accuracy on these very questions, so no fixed box is better. Points are the
    boxes' middles, counts the most frequent count.
    """
    true = np.array([a.boxes[0] for a in answers if a.kind in ("find", "refer") and len(a.boxes) == 1])
    if not len(true):
        return {}
    width, height = (true[:, 2:] - true[:, :2]).mean(axis=0)
    centre = [(UNITS - width) / 2, (UNITS - height) / 2, (UNITS + width) / 2, (UNITS + height) / 2]
    hits = [(box_iou(box, true) >= THRESHOLD).sum() for box in true]
    fixed = {"centre_box": [round(v) for v in centre], "most_frequent_box": true[int(np.argmax(hits))].tolist()}
    counts = Counter(a.truth for a in answers if a.kind == "count")
    result = {}
    for name, box in fixed.items():
        texts = {
            "find": str(box),
            "refer": str(box),
            "point": str([(box[0] + box[2]) // 2, (box[1] + box[3]) // 2]),
            "count": counts.most_common(1)[0][0] if counts else "",
        }
        result[name] = [
            PlaceAnswer(a.image, a.kind, a.question, a.truth, a.boxes, texts[a.kind])
            for a in answers
            if a.kind in texts
        ]
    return result


def place_scores(answers: Sequence[PlaceAnswer], resamples: int = 1000, seed: int = 0) -> dict:
    """Return the values of all statistics with intervals, numbers of questions by kind, and the fixed answers' values."""
    statistics = place_statistics(answers)
    fixed = {
        name: {key: s.value for key, s in place_statistics(own).items() if key not in ("absent_refused", "malformed")}
        for name, own in blind_answers(answers).items()
    }
    return {
        **{name: s.value for name, s in statistics.items()},
        "intervals": {name: interval(s, resamples, seed) for name, s in statistics.items()},
        "questions": dict(Counter(a.kind for a in answers)),
        **fixed,
    }
