"""Caption metrics reproduce published and independently computed values."""

import json
import math

import evaluate as hf_evaluate
import pytest

from blipren.training.errors import UserError
from blipren.training.evaluation.metrics.caption_scorers import score_texts
from blipren.training.evaluation.metrics.captions import (
    CAPTION_METRICS,
    caption_metrics,
    score_captions,
)
from blipren.training.evaluation.metrics.evaluate_wrappers import MODULES, module_path
from blipren.training.evaluation.metrics.meteor import meteor_formula
from blipren.training.evaluation.metrics.tokenizer import java_available

TOKENIZERS = [
    pytest.param("java", marks=pytest.mark.skipif(not java_available(), reason="there is no java on the PATH")),
    "python",
]
NAMES = {"CIDEr": "CIDEr", "ROUGE_L": "ROUGE-L", "METEOR": "METEOR", **{f"Bleu_{n}": f"BLEU-{n}" for n in range(1, 5)}}
DOGS = {"1": "a dog runs on the grass", "2": "two cats sleep"}
DOG_REFERENCES = {"1": ["a dog is running on the grass", "a brown dog runs"], "2": ["two cats are sleeping"]}


def load(path):
    return json.loads(path.read_text())


def agree(scores, expected, tolerance=1e-4):
    for name, value in expected.items():
        ours = scores.corpus.get(NAMES.get(name))
        if name in NAMES and ours is not None:
            assert ours == pytest.approx(value, abs=tolerance), name


@pytest.fixture(scope="module")
def human(shared_data):
    return load(shared_data("metric-reference") / "flickr8k_human" / "human_leave_one_out.json")


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_human_captions(human, tokenizer):
    scores = score_captions(human["hypotheses"], human["references"], tokenizer, meteor=tokenizer == "java")
    agree(scores, human["expected"], 1e-6)
    assert scores.corpus["METEOR"] is None or scores.corpus["METEOR"] == pytest.approx(0.24636, abs=1e-4)
    for key, expected in human["per_image"].items():
        for name in ("Bleu_4", "CIDEr", "ROUGE_L", "METEOR"):
            if NAMES[name] in scores.per_image:
                assert scores.per_image[NAMES[name]][key] == pytest.approx(expected[name], abs=1e-6)
    # the statistics that intervals are made of give the same value, and the interval holds it
    for name, (low, high) in scores.intervals(resamples=200).items():
        assert scores.statistics[name].value == pytest.approx(scores.corpus[name], abs=1e-6), name
        assert low <= scores.corpus[name] <= high, name
    assert human["bleu_stats"]["correct"] == scores.statistics["BLEU-4"].rows.sum(0)[6:].tolist()


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_shifted_captions_are_a_floor(human, shared_data, tokenizer):
    floor = load(shared_data("metric-reference") / "flickr8k_human" / "shifted_floor.json")
    agree(
        score_captions(floor["hypotheses"], human["references"], tokenizer, meteor=tokenizer == "java"),
        floor["expected"],
    )


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("kind", ["good", "bad"])
def test_clipscore_example(shared_data, kind, tokenizer):
    folder = shared_data("metric-reference") / "clipscore_example"
    expected = load(folder / "expected.json")[kind]
    scores = score_captions(
        load(folder / f"{kind}_captions.json"), load(folder / "refs.json"), tokenizer, meteor=tokenizer == "java"
    )
    agree(scores, expected)


def test_nlg_eval_with_white_space_tokens(shared_data):
    folder = shared_data("metric-reference") / "nlg_eval"
    expected = load(folder / "expected.json")
    lines = {name: (folder / f"{name}.txt").read_text().splitlines() for name in ("hyp", "ref1", "ref2")}
    scores = score_captions(
        dict(enumerate(lines["hyp"])), dict(enumerate(zip(lines["ref1"], lines["ref2"]))), "whitespace"
    )
    agree(scores, expected["file_example"], 1e-5)
    for example in expected["individual"]:
        agree(score_captions({0: example["hyp"]}, {0: example["refs"]}, "whitespace"), example["expected"], 1e-5)


def test_bleu_and_rouge_by_hand():
    scores = score_captions({1: "a b c d e"}, {1: ["a b c x e", "q"]}, "whitespace", meteor=False).corpus
    assert scores["BLEU-1"] == pytest.approx(4 / 5, abs=1e-6)
    assert scores["BLEU-2"] == pytest.approx(math.sqrt(4 / 5 * 2 / 4), abs=1e-6)
    assert scores["ROUGE-L"] == pytest.approx(4 / 5, abs=1e-6)
    short = score_captions({1: "a b"}, {1: ["a b c d"]}, "whitespace", meteor=False).corpus
    assert short["BLEU-1"] == pytest.approx(math.exp(1 - 4 / 2), abs=1e-6)


def test_without_java_meteor_is_none_and_said(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = score_captions(DOGS, DOG_REFERENCES)
    assert scores.tokenizer == "python" and scores.corpus["METEOR"] is None
    assert "METEOR needs Java" in scores.notes[0]
    with caplog.at_level("INFO"):
        values = caption_metrics(DOGS, DOG_REFERENCES)
    assert tuple(values) == CAPTION_METRICS and values["METEOR"] is None and values["CIDEr"] > 1
    assert "python tokenizer" in caplog.text and "METEOR needs Java" in caplog.text


@pytest.mark.skipif(not java_available(), reason="there is no java on the PATH")
def test_meteor_formula_and_odd_captions():
    predictions = {1: "a dog runs", 2: "", 3: "two cats | | | sleep", 4: "un café"}
    references = {1: ["a dog runs"], 2: ["a man"], 3: ["cats are sleeping", "two cats"], 4: ["le café"]}
    scores = score_captions(predictions, references)
    assert scores.per_image["METEOR"][1] == 1.0 and scores.per_image["METEOR"][2] == 0.0
    rows = scores.statistics["METEOR"].rows
    assert meteor_formula(rows).tolist() == pytest.approx(list(scores.per_image["METEOR"].values()))
    assert scores.statistics["METEOR"].value == pytest.approx(scores.corpus["METEOR"])


def test_text_statistics():
    values = score_texts(["a dog a dog", "a dog a dog", "the the cat"]).corpus
    assert values["distinct-1"] == pytest.approx(4 / 11) and values["distinct-2"] == pytest.approx(4 / 8)
    assert values["unique_captions"] == pytest.approx(2 / 3) and values["length"] == pytest.approx(11 / 3)
    assert values["repetition"] == pytest.approx(1 / 3)
    assert score_texts(["on the grass near on the grass"]).corpus["repetition"] == 1
    ended = dict(zip(DOGS, [True, False]))
    assert score_captions(DOGS, DOG_REFERENCES, "python", ended, meteor=False).corpus["cut_off"] == 1 / 2


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({}, {}, "no predictions"),
        ({"1": "a"}, {"2": ["a"]}, "2 are in one of them only, such as '1'"),
        ({"1": "a"}, {"1": []}, "at least one text"),
        ({"1": "a"}, {"1": "a"}, "at least one text"),
        ({"1": ["a"]}, {"1": ["a"]}, "must be one text"),
    ],
)
def test_wrong_input_is_named(predictions, references, message):
    with pytest.raises(UserError, match=message):
        caption_metrics(predictions, references, "python")


def test_evaluate_modules_load_and_combine(tmp_path):
    names = [name for name in MODULES if name not in ("meteor_1_5", "vqa_accuracy")]
    combined = hf_evaluate.combine([module_path(name) for name in names])
    keywords = {"predictions": list(DOGS.values()), "references": list(DOG_REFERENCES.values())}
    values = combined.compute(**keywords)
    ours = caption_metrics(DOGS, DOG_REFERENCES)
    assert {name: values[name] for name in ours if name != "METEOR"} == {
        n: v for n, v in ours.items() if n != "METEOR"
    }
    assert values["unique_captions"] == 1
    vqa = hf_evaluate.load(module_path("vqa_accuracy"))
    answers = [["dog"] * 2 + ["cat"] * 8, ["2"]]
    assert vqa.compute(predictions=["The dog.", "Two"], references=answers)["accuracy"] == 1
    meteor = hf_evaluate.load(module_path("meteor_1_5")).compute(**keywords)["METEOR"]
    assert (meteor is None) == (not java_available())
    with pytest.raises(ValueError, match="no metric module 'spice'"):
        module_path("spice")
