"""`benchmarks/experts.py` at toy size: arms of equal parameters and arithmetic, trained and evaluated, into one JSON."""

import json
import runpy
from pathlib import Path

import pytest
from transformers import LlamaConfig, SiglipVisionConfig

from blipren import BliprenConfig
from tests.common.processes import process_server

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "experts.py"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    words = "--scenes 40 --validation-scenes 8 --steps 2 --seeds 0 --device cpu --work work".split()
    words += ["--out", "experts.json", "--arms", "moe top 1", "mlp, arithmetic of top 1"]

    def run() -> str:
        program = process_server().start(words, folder / "output.txt", program=str(SCRIPT), cwd=folder)
        output, _ = program.communicate()
        assert program.returncode == 0, output
        return output

    run()
    assert "step 1/2" not in run()  # finished arms are not repeated
    return json.loads((folder / "experts.json").read_text())


def test_arms_have_equal_parameters_or_equal_arithmetic():
    benchmark = runpy.run_path(str(SCRIPT))
    size, chosen = benchmark["projector_size"], benchmark["projector_of"]
    config = BliprenConfig(vision_config=SiglipVisionConfig(hidden_size=96), text_config=LlamaConfig(hidden_size=128))

    def measure(arm):
        projector, options = chosen(arm, config, 128)
        return size(config, 128, projector=projector, **options)

    dense, one = measure("moe dense"), measure("moe top 1")
    assert dense[0] == one[0] and dense[1] > 3 * one[1]
    assert measure("mlp, parameters")[0] == pytest.approx(dense[0], rel=2e-3)
    for arm in ("dense", "top 2", "top 1"):
        experts, mlp = measure(f"moe {arm}"), measure(f"mlp, arithmetic of {arm}")
        assert mlp[1] == pytest.approx(experts[1], rel=5e-3)
    assert mlp[0] < 0.4 * one[0]


def test_every_arm_has_its_figures_and_experts_their_shares(report):
    for arm, found in report["data"]["scenes"].items():
        assert [result["seed"] for result in found["seeds"]] == [0]
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
