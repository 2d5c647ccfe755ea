"""Preferences about drawn scenes: the chosen caption is true, the rejected one is not, and neither names what is held out."""

import itertools
import json
import random
from collections import Counter

from blipren.training.quickstart.scenes import Split, held_out_reason, make_scene, write_scenes
from blipren.training.quickstart.similar_scenes import (
    PAIRS_PER_SCENE,
    iterate_crowded_rows,
    make_crowded_scene,
    similar_scene,
    write_pair,
    write_preferences,
)
from blipren.training.quickstart.truth import judge_caption


def test_a_similar_scene_has_one_change_and_nothing_held_out():
    changes = set()
    for number in range(200):
        scene = make_scene(0, number)
        other = similar_scene(scene, random.Random(number))
        gone, new = Counter(o.combination for o in scene.objects), Counter(o.combination for o in other.objects)
        change = sum((gone - new).values()), sum((new - gone).values())
        assert change in {(1, 1), (1, 0), (0, 1)} and held_out_reason(other) is None
        changes.add((*change, bool(new - gone) and set(new) <= set(gone)))
        assert len({(o.row, o.column) for o in other.objects}) == len(other.objects) in (1, 2, 3)
        by_kind = itertools.groupby(sorted(other.objects, key=lambda o: o.combination), key=lambda o: o.combination)
        assert all(len({o.size for o in group}) == 1 for _, group in by_kind), "counts stay unambiguous"
    assert changes >= {(1, 1, False), (1, 1, True), (1, 0, False), (0, 1, False)}, "True: an object is named twice"


def test_a_pair_is_a_true_caption_and_an_untrue_one_of_the_same_wording():
    for number in range(100):
        scene = make_scene(0, number)
        chosen, rejected = write_pair(scene, f"0/{number}")
        assert judge_caption(chosen, scene).true and not judge_caption(rejected, scene).true
        assert judge_caption(rejected, scene).problems[0].startswith(("objects", "states")), "it can be read"
        assert write_pair(scene, f"0/{number}") == (chosen, rejected)


def test_crowded_scenes_mostly_have_three_objects_and_nothing_held_out():
    scenes = [make_crowded_scene(0, index) for index in range(200)]
    counts = Counter(len(scene.objects) for scene in scenes)
    assert counts[3] > 140 and counts[1] and counts[2]
    assert not any(held_out_reason(scene) for scene in scenes)


def test_preferences_are_about_the_scenes_of_a_folder(tmp_path):
    splits = (Split("train", "seen", 4), Split("validation", "seen", 2))
    write_scenes(tmp_path / "scenes", 0, splits, iterate_crowded_rows)
    assert write_preferences(tmp_path / "scenes", tmp_path / "pairs", 0, "Short caption:") == 6 * PAIRS_PER_SCENE
    rows = [json.loads(line) for line in (tmp_path / "pairs" / "metadata.jsonl").read_text().splitlines()]
    assert Counter(row["split"] for row in rows) == {"train": 4 * PAIRS_PER_SCENE, "validation": 2 * PAIRS_PER_SCENE}
    assert len(list((tmp_path / "pairs" / "images").iterdir())) == 6
    assert all(row["prompt"] == "Short caption:" for row in rows)
