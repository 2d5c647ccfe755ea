"""Two gloo processes: the same loss and weights as one on the same global batch; resume from two to one and back."""

import shutil

import pytest
import torch

from blipren.training import caption
from tests.training.tools import events, run_command, weights


def finish(process):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


@pytest.fixture
def one_and_two(settings, tmp_path, deterministic_model):
    one = settings(model=str(deterministic_model), micro_batches=2, max_steps=6, save_every=3, log_every=1)
    two = type(one)(**one.__dict__ | {"out": str(tmp_path / "two")})
    return one, two


def test_two_processes_equal_one(one_and_two, tmp_path):
    one, two = one_and_two
    process = run_command(two, processes=2)
    caption.train(one)
    output = finish(process)
    assert "2 processes" in output
    a, b = weights(tmp_path / "run"), weights(tmp_path / "two")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=2e-3, atol=2e-4)
    for kind in ("train", "validation"):
        losses = [[e["loss"] for e in events(tmp_path / run, kind)] for run in ("run", "two")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5), kind


def killed_behind_step_3(folder):
    """What a run killed right behind its checkpoint of step 3 leaves."""
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    for name in ("finished.json", "model.safetensors"):
        (folder / name).unlink()


@pytest.mark.parametrize("processes", [(2, 1), (1, 2)], ids=["two-to-one", "one-to-two"])
def test_resume_on_another_number_of_processes(one_and_two, tmp_path, processes):
    one, two = one_and_two
    caption.train(one)
    shutil.copytree(tmp_path / "run", tmp_path / "two") if processes[0] == 1 else finish(run_command(two, 2))
    killed_behind_step_3(tmp_path / "two")
    if processes[1] == 1:
        caption.train(two)
    else:
        assert "checkpoint-3" in finish(run_command(two, 2))
    assert events(tmp_path / "two", "train")[-1]["step"] == 6
    a, b = weights(tmp_path / "run"), weights(tmp_path / "two")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=2e-3, atol=2e-4)
    losses = [[e["loss"] for e in events(tmp_path / run, "train")] for run in ("run", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
