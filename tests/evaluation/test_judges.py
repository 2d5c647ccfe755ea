"""Judges are found by entry points and columns: the quickstart's, and one of another package."""

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest

from blipren.training.commands.evaluate import EvaluateSettings
from blipren.training.evaluation.evaluate import evaluate
from blipren.training.evaluation.judges import find_judge, installed_judges
from blipren.training.quickstart.judge import SceneJudge

JUDGE = """
from blipren.training.evaluation.judges import CaptionVerdict


class ColourJudge:
    basis = "the painted colour"

    def judge_caption(self, caption, content):
        named = [word for word in caption.split() if word in ("red", "green", "blue", "yellow", "black", "white")]
        wrong = [word for word in named if word != content]
        return CaptionVerdict(named == [content], float(content in named), len(wrong), len(named), tuple(wrong))

    def list_objects(self, content):
        return [content]
"""


@pytest.fixture
def colour_judge(tmp_path, monkeypatch):
    """A package that brings a judge for the column `painted`, installed for the length of a test."""
    info = tmp_path / "site" / "colour_judge-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: colour-judge\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[blipren.judges]\npainted = colour_judge:ColourJudge\n")
    (info.parent / "colour_judge.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(str(info.parent))
    installed_judges.cache_clear()
    yield
    installed_judges.cache_clear()
    sys.modules.pop("colour_judge", None)


def test_scenes_are_judged_by_their_column():
    column, judge = find_judge([{"objects": []}, {"scene": ""}])
    assert column == "scene" and isinstance(judge, SceneJudge)
    assert find_judge([{"objects": [], "group": "seen"}]) is None


def test_another_package_brings_a_judge(colour_judge, colours, tmp_path):
    rows = [json.loads(line) for line in (colours / "metadata.jsonl").read_text().splitlines()]
    data = tmp_path / "data"
    data.mkdir()
    for row in rows:
        shutil.copy(colours / row["file_name"], data)
        row["painted"] = row["answers"][0]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    captions = {row["file_name"]: row["captions"][0] for row in rows}
    captions["006.png"] = "A blue picture ."  # it is red
    given = tmp_path / "given.json"
    given.write_text(json.dumps(captions))
    evaluate(
        EvaluateSettings(
            model="-", dataset=str(data), out=str(tmp_path / "out"), predictions=str(given), meteor=False, report=False
        )
    )
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["hallucination"]
    assert found["truth"] == "the painted colour"
    assert found["captions_true"] == pytest.approx(23 / 24) and found["hallucinated_objects"] == pytest.approx(1 / 24)


def test_the_evaluation_does_not_import_the_quickstart():
    folder = Path(__file__).parents[2] / "training" / "evaluation"
    for path in folder.rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        imported = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        assert not [module for module in imported if "quickstart" in module], path
