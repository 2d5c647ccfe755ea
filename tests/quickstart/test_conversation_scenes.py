"""Conversations about drawn scenes: answers are true, questions about two pictures are balanced."""

import json
import random

import pytest

from blipren.training.data.sources.open_rows import open_rows
from blipren.training.quickstart.conversation_scenes import (
    PAIR_QUESTIONS,
    Part,
    best_guess_share,
    draw_counts,
    iterate_rows,
    write_conversations,
)
from blipren.training.quickstart.scenes import held_out_reason

PARTS = (Part("train", "seen", 300, 1200), Part("test", "unseen", 60, 60))


@pytest.fixture(scope="module")
def rows():
    return list(iterate_rows(0, PARTS))


def test_answers_about_two_pictures_are_true_and_one_picture_does_not_tell_them(rows):
    scenes = {name: scene for _, new in rows for name, scene in new.items()}
    known: dict[str, list] = {kind: [] for kind in PAIR_QUESTIONS}
    for row, _ in rows:
        if row["kind"] == "scene":
            continue
        first, second = (scenes[name] for name in row["image"])
        answer = row["messages"][1]["content"]
        if row["kind"] == "different":
            gone, new = set(first.objects) - set(second.objects), set(second.objects) - set(first.objects)
            (a,), (b,) = gone, new
            same = {"color": a.colour == b.colour, "shape": a.shape == b.shape, "size": a.size == b.size}
            same["place"] = (a.row, a.column) == (b.row, b.column)
            assert [name for name, equal in same.items() if not equal] == [answer]
        elif row["kind"] == "same number":
            assert answer == ("yes" if len(first.objects) == len(second.objects) else "no")
        else:
            counts = len(first.objects), len(second.objects)
            assert answer == ("left" if counts[0] > counts[1] else "right" if counts[1] > counts[0] else "equal")
        known[row["kind"]].append((len(first.objects), answer))
    shares = {kind: best_guess_share(answers) for kind, answers in known.items()}
    assert shares["different"] < 0.33 and shares["same number"] < 0.57 and shares["more"] < 0.51


def test_of_numbers_one_tells_nothing_about_the_answer():
    for kind, chance in (("same number", 1 / 2), ("more", 3 / 7)):
        pairs = [draw_counts(kind, random.Random(k)) for k in range(7000)]
        answers = [
            (a == b) if kind == "same number" else (a > b) - (a < b) for a, b in pairs
        ]  # as `answer_pair` says it
        for known in ([0] * len(pairs), [a for a, _ in pairs], [b for _, b in pairs]):
            assert best_guess_share(list(zip(known, answers))) == pytest.approx(chance, abs=0.02)


def test_groups_hold_out_what_they_say_and_pictures_are_shared(rows):
    scenes = {name: scene for _, new in rows for name, scene in new.items()}
    shown = [name for row, _ in rows for name in row["image"]]
    assert len(shown) > 2 * len(set(shown)) and set(shown) == set(scenes)
    for row, new in rows:
        if row["group"] == "seen":
            assert all(held_out_reason(scene) is None for scene in new.values())
    turns = [len(row["messages"]) // 2 for row, _ in rows if row["kind"] == "scene"]
    assert max(turns) == 4 and sum(turns) / len(turns) > 3


def test_the_file_is_read_as_conversations(tmp_path):
    path = write_conversations(tmp_path, 0, (Part("train", "seen", 5, 5), Part("test", "unseen", 3, 3)))
    found = list(open_rows(str(path)))
    assert [row.conversation_error for row in found] == [None] * 16
    pair = next(row for row in found if len(row.conversation.images) == 2)
    kinds = [part["type"] for part in pair.conversation.messages[0]["content"]]
    assert kinds == ["text", "image", "text", "image", "text"]
    assert json.loads(path.read_text().splitlines()[0])["captions"] == found[0].answers
