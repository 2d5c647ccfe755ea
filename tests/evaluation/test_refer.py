"""`evaluate --tasks refer`: the questions that are asked, what is written, and what is refused."""

import json

import pytest

from blipren.training.cli import main
from blipren.training.commands.evaluate import EvaluateSettings
from blipren.training.data.sources.grounding import KINDS
from blipren.training.errors import UsageError
from blipren.training.evaluation.evaluate import evaluate
from blipren.training.evaluation.examples import open_split
from blipren.training.evaluation.refer import add_places, place_lines, place_questions, place_rows
from blipren.training.evaluation.results import Evaluation
from blipren.training.quickstart.grounded_scenes import iterate_grounded_rows
from blipren.training.quickstart.scenes import Split, write_scenes


@pytest.fixture(scope="module")
def boxed_scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("boxed-scenes")
    write_scenes(folder, 0, (Split("test", "seen", 4), Split("test", "unseen", 4)), iterate_grounded_rows)
    return folder


def run_evaluate(model, dataset, out, **options):
    evaluate(
        EvaluateSettings(model=str(model), dataset=str(dataset), out=str(out), probe=False, report=False, **options)
    )
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    return json.loads((out / "metrics.json").read_text()), rows


def test_true_answers_are_all_right(boxed_scenes):
    """With the true answers in place of a model's every score is perfect, in every group."""
    split = open_split(str(boxed_scenes), keep_columns=True)
    result = Evaluation(examples=split.examples)
    for example in split.examples:
        questions = place_questions(example, example.load(), KINDS, "xywh")
        result.records[example.id] = {"places": [q | {"text": q["truth"]} for q in questions]}
    add_places(result, EvaluateSettings(model="m", dataset="d", out="o", tasks=["refer"], resamples=10))
    scores = result.metrics["refer"]
    for part in (scores, scores["seen"], scores["unseen"]):
        for name in ("accuracy", "mean_iou", "absent_refused", "counting", "naming", "pointing", "caption_F1"):
            assert part[name] == 1, name
        assert part["false_finds"] == part["malformed"] == 0
        assert part["centre_box"]["accuracy"] < 0.5 and part["centre_box"]["false_finds"] == 1
    rows = place_rows(result.places)
    assert {row["refer"] for row in rows} == {"find", "name", "count", "point", "caption"}
    assert len(rows) == sum(scores["questions"].values()) and all(row["iou"] == 1 for row in rows if "iou" in row)
    assert "accuracy 1.000" in place_lines(scores)[0]


def test_a_model_is_asked(boxed_scenes, seeing, tmp_path):
    metrics, rows = run_evaluate(
        seeing, boxed_scenes, tmp_path / "out", tasks=["refer", "captioning"], grounding=["find"], limit=3
    )
    assert set(metrics["refer"]["questions"]) == {"find"} and metrics["refer"]["images"] == 3
    assert metrics["refer"]["accuracy"] == 0 and "captioning" in metrics
    assert [row["refer"] for row in rows if "refer" in row] == ["find"] * metrics["refer"]["questions"]["find"]


def test_wrong_use_is_named(colours, seeing, tmp_path, capsys):
    with pytest.raises(UsageError, match="grounding chooses the questions of --tasks refer"):
        EvaluateSettings(model="m", dataset="d", out="o", grounding=["find"])
    with pytest.raises(UsageError, match="grounding has 'boxes'"):
        EvaluateSettings(model="m", dataset="d", out="o", tasks=["refer"], grounding=["boxes"])
    assert main(["evaluate", str(seeing), str(colours), str(tmp_path / "o"), "--tasks", "refer"]) == 1
    assert "has boxes or points for --tasks refer" in capsys.readouterr().err
