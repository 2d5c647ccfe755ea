"""Rewards: what each gives, what it does not apply to, and what a wrong one says."""

import random

import pytest

from blipren.training.commands.grpo import REWARDS, GrpoSettings
from blipren.training.errors import UsageError, UserError
from blipren.training.evaluation.metrics.captions import score_captions
from blipren.training.objectives.rewards.build import Completions, build_rewards
from blipren.training.quickstart.scenes import make_scene
from blipren.training.quickstart.wording import write_captions

CAPTIONS = {
    "a": ["a red ball on the grass", "the ball is red"],
    "b": ["two dogs run on a beach", "dogs on a beach"],
    "c": ["a man rides a bicycle", "a bicycle on a street"],
}


def settings(*rewards, **changes) -> GrpoSettings:
    return GrpoSettings(model="m", cache="c", out="o", rewards=list(rewards), **changes)


def rows(*texts, prompt=None, references=(), image="a", facts=None, ended=True) -> Completions:
    count = len(texts)
    return Completions(
        prompts=[prompt] * count,
        completions=list(texts),
        completion_ids=[[1]] * count,
        references=[list(references)] * count,
        image_ids=[image] * count,
        facts=[facts or {}] * count,
        ended=[ended] * count,
    )


def build(*rewards, facts=None, **changes):
    return build_rewards(settings(*rewards, **changes), CAPTIONS, {"v": ["a red dog"]}, facts or {})


def test_cider_is_the_metrics():
    (reward,) = build("cider")
    texts = {"a": "a red ball", "b": "dogs run on a beach", "c": "a dog"}
    found = [reward(rows(text, image=image))[0] for image, text in texts.items()]
    expected = score_captions(texts, CAPTIONS, tokenizer="python", meteor=False).corpus["CIDEr"]
    assert sum(found) / 3 == pytest.approx(expected)
    assert reward(rows("a red dog", image="v"))[0] > 5, "validation images have references, too"
    assert reward(rows("red", prompt="What colour?")) == [None]
    assert reward(rows("a red ball", ended=False)) == [0.0], "a caption that was cut off gets nothing"


def test_vqa_and_choice():
    vqa, choice = build("vqa", "choice")
    assert vqa(rows(" The RED bus.", "a dog", prompt="?", references=["red bus"])) == [1.0, 0.0]
    assert vqa(rows("red")) == choice(rows("red")) == [None]
    options = rows("(B) a cat", "B", "a cat", "(A) a dog", "b", prompt="?", references=["(B) a cat"])
    assert choice(options) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert choice(rows("The cat", "dog", prompt="?", references=["a cat"])) == [1.0, 0.0]


def test_box():
    (box,) = build("box")
    truth = "[0, 0, 100, 100], [500, 500, 600, 600]"
    said = rows("[500, 500, 600, 600], [0, 0, 100, 100]", "[0, 0, 100, 100]", "no", prompt="?", references=[truth])
    assert box(said) == [1.0, 0.5, 0.0]
    assert box(rows("not in the picture", "[1, 2, 3, 4]", prompt="?", references=["not in the picture"])) == [1.0, 0.0]
    assert box(rows("2", prompt="?", references=["2"])) == box(rows("[0, 0, 100, 100]", references=[truth])) == [None]


def test_scene_and_hallucination_by_the_judge():
    scene = make_scene(0, 0)
    facts = {"a": {"scene": scene.to_json()}}
    true = write_captions(scene, random.Random(0))[0]
    truth, there = build_rewards(settings("scene", "hallucination", facts="f"), CAPTIONS, {}, facts)
    absent = next(
        f"a {colour} {shape}"
        for colour in ("red", "green", "blue")
        for shape in ("circle", "star", "cross")
        if (colour, shape) not in {o.combination for o in scene.objects}
    )
    judged = rows(true, absent, f"{true} and {absent}", "", facts=facts["a"])
    assert truth(judged) == [1.0, 0.0, 0.0, 0.0]
    found = there(judged)
    assert found[0] == 1.0 and found[1] == 0.0 and 0 < found[2] < 1 and found[3] == 1.0
    assert truth(rows(true, facts=facts["a"], ended=False)) == [0.0]
    assert truth(rows(true, facts=facts["a"], prompt="?")) == truth(rows(true)) == [None]


def test_hallucination_by_references_and_boxes():
    (there,) = build("hallucination")
    texts = ("a dog on a beach", "a dog and a cat", "grass")
    assert there(rows(*texts, references=CAPTIONS["b"])) == [1.0, 0.5, 1.0]
    boxes = {"objects": [{"category": "cat"}]}
    assert there(rows("a dog and a cat", references=CAPTIONS["b"], facts=boxes)) == [1.0]


def test_format_and_length():
    form, length = build("format", "length", format_pattern=r"\d+ (dogs|cats)", length_limit=3)
    assert form(rows("2 dogs", "two dogs", " 3 cats ")) == [1.0, 0.0, 1.0]
    assert length(rows("a b c", "a b c d e f", "")) == [1.0, 0.5, 1.0]


def longer(completions, image_ids, **columns):
    return [len(text) if image == "a" else None for text, image in zip(completions, image_ids)]


def too_few(completions, **columns):
    return [1.0]


def no_number(completions, **columns):
    return ["good"] * len(completions)


def failing(completions, **columns):
    raise KeyError("gold")


def test_a_function_of_the_user():
    (reward,) = build(f"{__name__}:longer", reward_weights=[0.5])
    assert reward(rows("abc", "")) == [3.0, 0.0] and reward(rows("abc", image="b")) == [None]
    assert reward.weight == 0.5


@pytest.mark.parametrize(
    "function, message",
    [("too_few", "gave 1 numbers for 2"), ("no_number", "gave 'good'"), ("failing", "failed: KeyError: 'gold'")],
)
def test_a_wrong_function_is_named(function, message):
    (reward,) = build(f"{__name__}:{function}")
    with pytest.raises(UserError, match=message):
        reward(rows("a", "b"))


@pytest.mark.parametrize(
    "rewards, changes, message",
    [
        ([], {}, "needs --rewards"),
        (["beauty"], {}, "rewards has 'beauty'"),
        (["cider", "cider"], {}, "names one twice"),
        (["cider"], {"reward_weights": [1.0, 2.0]}, "2 numbers for 1 rewards"),
        (["format"], {}, "reward format needs format_pattern"),
        (["format"], {"format_pattern": "("}, "no regular expression"),
        (["length"], {}, "reward length needs length_limit"),
        (["scene"], {}, "reward scene needs facts"),
    ],
)
def test_wrong_settings(rewards, changes, message):
    with pytest.raises(UsageError, match=message):
        settings(*rewards, **changes)


def test_what_cannot_be_rewarded():
    with pytest.raises(UserError, match="no column of an installed judge: scene"):
        build_rewards(settings("scene", facts="folder"), CAPTIONS, {}, {"a": {"group": "seen"}})
    with pytest.raises(UserError, match="captions of two images"):
        build_rewards(settings("cider"), {}, {}, {})
    with pytest.raises(UserError, match="reward tests:nothing cannot be imported"):
        build("tests:nothing")


def test_prompts_are_those_that_a_reward_applies_to():
    kinds = {name: settings(name, facts="f", format_pattern="x", length_limit=1).prompt_kinds() for name in REWARDS}
    assert kinds["cider"] == kinds["scene"] == kinds["hallucination"] == {"captions"}
    assert kinds["vqa"] == kinds["choice"] == {"questions"}
    assert kinds["length"] == settings("cider", "vqa").prompt_kinds() == {"captions", "questions"}
