"""CHAIR, the judge of drawn scenes, POPE."""

import json
from collections import Counter

import pytest

from blipren.training.commands.evaluate import EvaluateSettings
from blipren.training.evaluation.evaluate import evaluate
from blipren.training.evaluation.metrics.hallucination import COCO_WORDS, chair, coco_objects, judge_captions, singular
from blipren.training.evaluation.metrics.pope import PopeQuestion, pope_questions, pope_scores
from blipren.training.quickstart.judge import SceneJudge
from blipren.training.quickstart.scenes import make_scene


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("Two dogs and a man in an orange shirt eat hot dogs.", ["dog", "person", "hot dog"]),
        ("Women riding bicycles next to buses", ["person", "bicycle", "bus"]),
        ("an apple and an orange on a dining table", ["apple", "orange", "dining table"]),
        ("A traffic light above a fire hydrant by the train tracks", ["traffic light", "fire hydrant"]),
        ("People watch knives, sheep and skis.", ["person", "knife", "sheep", "skis"]),
        ("the sky is grey", []),
    ],
)
def test_object_words(caption, objects):
    assert coco_objects(caption) == objects


def test_every_category_names_itself():
    assert len(COCO_WORDS) == 80
    for category in COCO_WORDS:
        assert coco_objects(f"there is a {category}") == [category]
    assert singular("glasses") == "glass" and singular("puppies") == "puppy" and singular("bus") == "bus"


def test_chair_by_hand():
    captions = {1: "a dog and a cat", 2: "a man", 3: "a red car"}
    references = {1: ["a dog"], 2: ["somebody"], 3: ["a street"]}
    found = chair(captions, references, {1: ["couch"], 2: ["person"]})
    assert found.values["CHAIR_i"] == pytest.approx(1 / 3) and found.values["CHAIR_s"] == pytest.approx(1 / 2)
    assert found.per_image[1]["hallucinated"] == ["cat"] and 3 not in found.per_image
    assert found.statistics["CHAIR_i"].value == found.values["CHAIR_i"]
    assert "upper bound" in chair(captions, references).basis


def test_human_captions_hallucinate_little_and_foreign_ones_much(shared_data):
    lines = (shared_data("coco-mini") / "metadata.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["objects"]]
    boxes = {row["file_name"]: [o["category"] for o in row["objects"]] for row in rows}
    references = {row["file_name"]: row["captions"][1:] for row in rows}
    human = {row["file_name"]: row["captions"][0] for row in rows}
    foreign = dict(zip(human, [*list(human.values())[1:], "a dog"]))
    assert chair(human, references, boxes).values["CHAIR_i"] < 0.05
    assert chair(foreign, references, boxes).values["CHAIR_i"] > 0.6


def test_scenes_are_judged():
    judge = SceneJudge()
    scenes = {i: make_scene(0, i) for i in range(4)}
    first = scenes[0].objects[0]
    captions = {i: f"a {s.objects[0].colour} {s.objects[0].shape}" for i, s in scenes.items()}
    found = judge_captions(captions, {i: s.to_json() for i, s in scenes.items()}, judge)
    assert found.values["hallucinated_objects"] == 0 and found.values["attribute_recall"] > 0
    wrong = judge_captions({0: "a pink elephant"}, {0: scenes[0].to_json()}, judge)
    assert wrong.values["captions_true"] == 0 and wrong.per_image[0]["problems"]
    assert f"{first.colour} {first.shape}" in judge.list_objects(scenes[0].to_json())


def test_pope_questions_are_balanced_and_true():
    objects = {f"i{i}": names for i, names in enumerate([["dog", "man"], ["dog", "car"], ["cat"], [], ["dog", "man"]])}
    questions = pope_questions(objects, per_image=2)
    assert questions == pope_questions(objects, per_image=2)
    for q in questions:
        assert (q.object in objects[q.image]) == q.answer
    counts = Counter((q.strategy, q.answer) for q in questions)
    assert len(set(counts.values())) == 1
    popular = [q.object for q in questions if q.strategy == "popular" and q.image == "i2" and not q.answer]
    assert popular == ["dog"]
    adversarial = [q.object for q in questions if q.strategy == "adversarial" and q.image == "i1" and not q.answer]
    assert adversarial[0] == "man"  # what most often stands beside a dog
    assert PopeQuestion("i", "apple", True, "random").text == "Is there an apple?"


def test_pope_scores_of_a_yes_sayer():
    questions = pope_questions({"a": ["dog"], "b": ["cat"], "c": ["car"]}, per_image=1)
    table = pope_scores(questions, [True] * len(questions), resamples=100)
    assert table["random"]["accuracy"] == 0.5 and table["random"]["yes_share"] == 1 and table["random"]["recall"] == 1
    right = pope_scores(questions, [q.answer for q in questions], resamples=100)
    assert all(values["F1"] == 1 for values in right.values())


def test_pope_and_the_judge_through_the_command(untrained, tmp_path):
    from blipren.training.quickstart.scenes import Split, write_scenes

    write_scenes(tmp_path / "scenes", 3, (Split("test", "seen", 3), Split("test", "unseen", 3)))
    evaluate(
        EvaluateSettings(
            model=str(untrained), dataset=str(tmp_path / "scenes"), out=str(tmp_path / "out"), device="cpu",
            tasks=["captioning", "vqa", "pope"], max_new_tokens=3, resamples=50, report=False, meteor=False,
        )
    )  # fmt: skip
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (
        metrics["hallucination"]["captions_true"] == 0 and metrics["hallucination"]["truth"] == "the scenes themselves"
    )
    assert {"seen", "unseen"} <= set(metrics["hallucination"])
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    asked = [row for row in rows if row.get("pope") == "random"]
    right = [row["right"] for row in asked]
    assert len(asked) == metrics["pope"]["random"]["questions"]
    assert sum(right) / len(right) == pytest.approx(metrics["pope"]["random"]["accuracy"])
    assert all((row["caption"] == row["references"][0]) == bool(row["right"]) for row in asked)
    assert metrics["pope"]["random"]["questions"] == metrics["pope"]["popular"]["questions"] > 0
    assert metrics["vqa"]["questions"] == metrics["counts"]["questions"]
