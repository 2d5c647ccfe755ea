"""`benchmarks/experts.py` at toy size: arms of equal parameters and arithmetic, trained and evaluated, into one JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "experts.py"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    command = [
        sys.executable,
        SCRIPT,
        "--scenes",
        "40",
        "--validation-scenes",
        "8",
        "--steps",
        "2",
        "--seeds",
        "0",
        "1",
    ]
    command += ["--arms", "moe dense", "moe top 1", "mlp, parameters", "mlp, arithmetic of top 1", "--device", "cpu"]
    command += ["--jobs", "2", "--work", "work", "--out", "experts.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    again = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert again.returncode == 0 and "step 1/2" not in again.stdout  # finished arms are not repeated
    return json.loads((folder / "experts.json").read_text())


def test_arms_have_equal_parameters_or_equal_arithmetic(report):
    arms = report["data"]["scenes"]
    dense, one = arms["moe dense"], arms["moe top 1"]
    assert dense["parameters"] == one["parameters"]
    assert dense["flops_an_image"] > 3 * one["flops_an_image"]
    wide, narrow = arms["mlp, parameters"], arms["mlp, arithmetic of top 1"]
    assert wide["parameters"] == pytest.approx(dense["parameters"], rel=2e-3)
    assert narrow["flops_an_image"] == pytest.approx(one["flops_an_image"], rel=5e-3)
    assert narrow["parameters"] < 0.4 * one["parameters"]


def test_every_arm_has_its_figures_and_experts_their_shares(report):
    for arm, found in report["data"]["scenes"].items():
        assert [result["seed"] for result in found["seeds"]] == [0, 1]
        assert {result["steps"] for result in found["seeds"]} == {2}
        assert {"captioning CIDEr", "vqa accuracy", "hallucination captions_true", "validation loss, best"} <= set(
            found["mean"]
        )
        assert found["range"]["validation loss, best"][0] <= found["mean"]["validation loss, best"]
        for result in found["seeds"]:
            assert ("experts" in result) == arm.startswith("moe")
            if "experts" in result:
                assert len(result["experts"]["mean"]) == 4
                assert sum(result["experts"]["mean"]) == pytest.approx(1)
                assert sum(result["experts"]["first"]) == pytest.approx(1)
                assert 0 < result["experts"]["entropy"] <= 1
