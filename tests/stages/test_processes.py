"""Two gloo processes: the same loss and weights as one on the same global batch; resume from two to one and back."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import blipren
from blipren.training.stages import train as caption
from tests.stages.tools import events, fork_command, run_command, weights


def finish(process):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


@pytest.fixture
def one_and_two(settings, tmp_path, deterministic_model):
    one = settings(model=str(deterministic_model), micro_batches=2, max_steps=6, save_every=3, log_every=1)
    two = type(one)(**one.__dict__ | {"out": str(tmp_path / "two")})
    return one, two


def same(a, b):
    """Weights to rounding, losses to five digits: sums come in another order."""
    ours, theirs = weights(a), weights(b)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=2e-3, atol=2e-4)
    for kind in ("train", "validation"):
        losses = [[(e["step"], e["loss"]) for e in events(run, kind)] for run in (a, b)]
        assert [s for s, _ in losses[0]] == [s for s, _ in losses[1]]
        assert [x for _, x in losses[0]] == pytest.approx([x for _, x in losses[1]], rel=1e-5), kind


def killed_behind_step_3(folder):
    """What a run killed right behind its checkpoint of step 3 leaves."""
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    for name in ("finished.json", "model.safetensors"):
        (folder / name).unlink()


def test_two_processes_equal_one_and_resume_on_one(one_and_two, tmp_path):
    one, two = one_and_two
    process = run_command(two, processes=2)
    caption.train(one)
    assert "2 processes" in finish(process)
    same(tmp_path / "run", tmp_path / "two")
    killed_behind_step_3(tmp_path / "two")
    caption.train(two)
    same(tmp_path / "run", tmp_path / "two")


def test_one_process_resumes_on_two(one_and_two, tmp_path):
    one, two = one_and_two
    caption.train(one)
    shutil.copytree(tmp_path / "run", tmp_path / "two")
    killed_behind_step_3(tmp_path / "two")
    assert "checkpoint-3" in finish(fork_command(two, 2))
    same(tmp_path / "run", tmp_path / "two")


def test_sharded_over_two_processes_equals_one_and_resumes_on_one(one_and_two, tmp_path):
    """With two micro-batches a process, whose gradients are reduced with the last one."""
    one, two = (type(run)(**run.__dict__ | {"ema": 0.5, "micro_batches": 4}) for run in one_and_two)
    process = fork_command(type(two)(**two.__dict__ | {"fsdp": True}), processes=2)
    caption.train(one)
    finish(process)
    same(tmp_path / "run", tmp_path / "two")
    killed_behind_step_3(tmp_path / "two")
    caption.train(two)  # what two sharded processes wrote, one takes up
    same(tmp_path / "run", tmp_path / "two")


# ---- DeepSpeed ----------------------------------------------------------------------------------------------------

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None or shutil.which("g++") is None,
    reason="DeepSpeed on CPUs needs itself (pip install deepspeed) and a C++ compiler",
)


def with_deepspeed(settings, recipe: str):
    config = Path(blipren.__file__).parent / "training" / "recipes" / "deepspeed" / f"{recipe}.json"
    return type(settings)(**settings.__dict__ | {"deepspeed": str(config)})


@needs_deepspeed
def test_deepspeed_on_two_processes_equals_one_and_resumes_without_it(one_and_two, tmp_path):
    one, two = (type(run)(**run.__dict__ | {"ema": 0.5, "micro_batches": 4}) for run in one_and_two)
    process = fork_command(with_deepspeed(two, "zero2"), processes=2)
    caption.train(one)
    finish(process)
    same(tmp_path / "run", tmp_path / "two")
    killed_behind_step_3(tmp_path / "two")
    caption.train(two)
    same(tmp_path / "run", tmp_path / "two")


@needs_deepspeed
def test_a_run_resumes_under_deepspeed_with_the_optimizer_offloaded(one_and_two, tmp_path):
    one, two = one_and_two
    caption.train(one)
    shutil.copytree(tmp_path / "run", tmp_path / "two")
    killed_behind_step_3(tmp_path / "two")
    assert "checkpoint-3" in finish(fork_command(with_deepspeed(two, "zero2-offload"), 2))
    same(tmp_path / "run", tmp_path / "two")
