"""Scenes: the same from a seed everywhere, nothing held out in training, captions and answers true."""

import json
import random
from collections import Counter

import pytest
from datasets import load_dataset

from blipren.training.quickstart.scenes import (
    COLOURS,
    DEFAULT_SPLITS,
    HELD_OUT_COMBINATIONS,
    SHAPES,
    Scene,
    Split,
    draw_scene,
    held_out_reason,
    iterate_rows,
    make_scene,
    write_scenes,
)
from blipren.training.quickstart.truth import judge_caption
from blipren.training.quickstart.wording import plural

FIRST_SCENE = [
    ("small", "orange", "circle", 0, 0),
    ("small", "orange", "circle", 1, 0),
    ("small", "orange", "circle", 2, 2),
]
SMALL = (
    Split("train", "seen", 12),
    Split("validation", "seen", 3),
    Split("test", "seen", 3),
    Split("test", "unseen", 4),
)


@pytest.fixture(scope="module")
def rows():
    return {g: list(iterate_rows(3, (Split("train", g, 400),))) for g in ("seen", "unseen")}


def test_scene_is_the_same_from_the_same_seed():
    assert make_scene(1, 5) == make_scene(1, 5)
    assert (
        len({make_scene(1, i).to_json() for i in range(50)} | {make_scene(2, i).to_json() for i in range(50)}) == 100
    )
    first = make_scene(0, 0)
    assert Scene.from_json(first.to_json()) == first
    assert draw_scene(first).tobytes() == draw_scene(Scene.from_json(first.to_json())).tobytes()


def test_scene_of_a_seed_never_changes():
    """The towers were trained on these scenes: another drawing needs other towers."""
    described = [(o.size, o.colour, o.shape, o.row, o.column) for o in make_scene(0, 0).objects]
    assert described == FIRST_SCENE


def test_default_splits_are_large_enough():
    assert sum(s.count for s in DEFAULT_SPLITS) >= 6000
    assert {(s.name, s.group) for s in DEFAULT_SPLITS} >= {("train", "seen"), ("test", "seen"), ("test", "unseen")}
    assert all(s.group == "seen" for s in DEFAULT_SPLITS if s.name != "test")


def test_held_out_combinations_only_in_unseen_scenes(rows):
    for row in rows["seen"]:
        assert held_out_reason(Scene.from_json(row["scene"])) is None
    reasons = Counter(held_out_reason(Scene.from_json(row["scene"])) for row in rows["unseen"])
    assert reasons == {"combination": 200, "pair": 200}
    for index, part in ((0, COLOURS), (1, SHAPES)):  # every word of a held-out combination is seen in others
        seen = {o.combination[index] for row in rows["seen"] for o in Scene.from_json(row["scene"]).objects}
        assert seen == set(part)


def test_no_training_text_names_a_held_out_combination(rows):
    for row in rows["seen"]:
        text = " ".join(row["captions"] + row["questions"])
        for colour, shape in HELD_OUT_COMBINATIONS:
            assert f"{colour} {shape}" not in text
            assert f"{colour} {plural(shape)}" not in text


def test_captions_differ_and_are_true(rows):
    for row in rows["seen"] + rows["unseen"]:
        scene = Scene.from_json(row["scene"])
        assert len(set(row["captions"])) == len(row["captions"]) >= 3
        for caption in row["captions"]:
            verdict = judge_caption(caption, scene)
            assert verdict.true, (caption, verdict.problems)
            assert verdict.attribute_recall == 1
            assert verdict.hallucinated == 0


def test_answers_follow_from_the_scene(rows):
    """Read back by rules of their own: the questions' answers are what the objects say."""
    checked = Counter()
    for row in rows["seen"] + rows["unseen"]:
        objects = Scene.from_json(row["scene"]).objects
        for question, answer in zip(row["questions"], row["answers"], strict=True):
            words = question.rstrip("?").split()
            if question.startswith("What color"):
                assert [o.colour for o in objects if o.shape == words[-1]] == [answer]
            elif question.startswith("What is"):
                assert [o.shape for o in objects if o.colour == words[3]] == [answer]
            elif question == "How many shapes are there?":
                assert {"one": 1, "two": 2, "three": 3}[answer] == len(objects)
            elif question.startswith("How many"):
                same = [o for o in objects if o.colour == words[2] and words[3] == plural(o.shape)]
                assert {"one": 1, "two": 2, "three": 3}[answer] == len(same)
            elif question.startswith("Is there"):
                assert (answer == "yes") == any(o.colour == words[3] and o.shape == words[4] for o in objects)
            elif question.endswith("small or large?"):
                assert [o.size for o in objects if (o.colour, o.shape) == tuple(words[2:4])] == [answer]
            elif question.startswith("Where"):
                (o,) = [o for o in objects if (o.colour, o.shape) == tuple(words[3:5])]
                row_name, column_name = ("top", None, "bottom")[o.row], ("left", None, "right")[o.column]
                assert answer == (" ".join(w for w in (row_name, column_name) if w) or "center")
            else:
                assert question.startswith("Is the ")
                (first,) = [o for o in objects if (o.colour, o.shape) == tuple(words[2:4])]
                (second,) = [o for o in objects if (o.colour, o.shape) == tuple(words[-2:])]
                holds = {
                    "left": first.column < second.column,
                    "right": first.column > second.column,
                    "above": first.row < second.row,
                    "below": first.row > second.row,
                }
                (name,) = [n for n in holds if n in words[4:-2]]
                assert answer == ("yes" if holds[name] else "no")
            checked[question.split()[0] + answer * (answer in ("yes", "no"))] += 1
    assert min(checked["Isyes"], checked["Isno"]) > 0.6 * max(checked["Isyes"], checked["Isno"])
    assert {"What", "How", "Where", "Is"} <= set(checked)


def test_folder_is_read_by_datasets(tmp_path):
    folder = tmp_path / "scenes"
    assert write_scenes(folder, seed=4, splits=SMALL) == 22
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len({line["file_name"] for line in lines}) == 22
    data = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(data) == 22
    row = data[random.Random(0).randrange(22)]
    assert row["image"].size == (96, 96)
    assert {"captions", "questions", "answers", "split", "group", "scene"} <= set(row)
    assert Counter(data["split"]) == {"train": 12, "validation": 3, "test": 7}
    again = tmp_path / "again"
    write_scenes(again, seed=4, splits=SMALL)
    assert (again / "metadata.jsonl").read_bytes() == (folder / "metadata.jsonl").read_bytes()
    name = lines[7]["file_name"]
    assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_unknown_group_is_an_error():
    with pytest.raises(ValueError, match="'seen' or 'unseen'"):
        make_scene(0, 0, "other")
