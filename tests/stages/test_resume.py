"""A run killed at any moment ends with the same weights, bit for bit, as one never killed."""

import json
import os
import shutil
import signal
import time

import pytest
import torch

from blipren.training.engine import checkpoints
from blipren.training.stages import train as caption
from tests.stages.tools import events, fork_command, run_command, weights

SAVE = 3


def last_step(folder):
    try:
        return max((e["step"] for e in events(folder, "train")), default=0)
    except (FileNotFoundError, json.JSONDecodeError):
        return 0


def kill_at(settings, folder, step, delay):
    """Starts the command and sends SIGKILL `delay` seconds after it logged `step`."""
    process = fork_command(settings)
    deadline = time.monotonic() + 240
    while last_step(folder) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(delay)
    assert process.poll() is None, "the run was over before it was killed"
    process.send_signal(signal.SIGKILL)
    process.communicate()


def run_with_kills(settings, folder, moments):
    for step, delay in moments:
        kill_at(settings, folder, step, delay)
        assert not (folder / "finished.json").exists()
    output = fork_command(settings).communicate(timeout=240)[0]
    assert "resuming from" in output and "done: " in output, output


def same_bits(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture
def two_runs(settings, tmp_path):
    """Settings with everything that draws: dropout, noise, word dropout, an average, accumulation, two workers."""
    never = settings(
        max_steps=30, eval_every=10, save_every=SAVE, log_every=1, micro_batches=2, workers=2, generate_samples=0,
        word_dropout=0.2, feature_dropout=0.1, feature_noise=0.1, ema=0.9, patience=50,
    )  # fmt: skip
    return never, type(never)(**never.__dict__ | {"out": str(tmp_path / "killed")})


def test_three_kills_end_with_the_same_bits(two_runs, tmp_path):
    never, killed = two_runs
    caption.train(never)
    # before the first checkpoint, in the middle of a step or a save, and right behind a validation
    run_with_kills(killed, tmp_path / "killed", [(1, 0.0), (7, 0.013), (20, 0.004)])
    same_bits(weights(tmp_path / "run"), weights(tmp_path / "killed"))
    for kind in ("train", "validation"):
        assert [(e["step"], e["loss"]) for e in events(tmp_path / "run", kind)] == [
            (e["step"], e["loss"]) for e in events(tmp_path / "killed", kind)
        ]


@pytest.mark.slow
def test_twenty_kills_end_with_the_same_bits(two_runs, tmp_path):
    never, killed = (type(run)(**run.__dict__ | {"max_steps": 60}) for run in two_runs)
    caption.train(never)
    run_with_kills(killed, tmp_path / "killed", [(1 + i * 2, 0.007 * i % 0.05) for i in range(20)])
    same_bits(weights(tmp_path / "run"), weights(tmp_path / "killed"))


def test_a_kill_online_ends_with_the_same_bits(two_runs, dataset_dir, tmp_path):
    """Straight from augmented images, the encoder trained too: its draws, weights and moments come back as well."""
    online = {"cache": str(dataset_dir), "online": True, "augment": True, "train_vision": True, "max_steps": 12}
    never, killed = (type(run)(**run.__dict__ | online) for run in two_runs)
    caption.train(never)
    run_with_kills(killed, tmp_path / "killed", [(7, 0.01)])
    same_bits(weights(tmp_path / "run"), weights(tmp_path / "killed"))


def test_muon_resumes_with_the_same_bits(settings, tmp_path, capsys):
    run = settings(optimizer="muon", muon_learning_rate=1e-2, max_steps=6, save_every=3, eval_every=6)
    caption.train(run)
    before = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-6")
    for name in ("finished.json", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    capsys.readouterr()
    caption.train(run)
    assert "checkpoint-3" in capsys.readouterr().out
    same_bits(before, weights(tmp_path / "run"))


def test_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(settings, tmp_path, capsys):
    run = settings(max_steps=6, save_every=2, eval_every=6)
    caption.train(run)
    before = weights(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "checkpoint-6"
    data = bytearray((newest / "optimizer.pt").read_bytes())
    data[len(data) // 2] ^= 4
    (newest / "optimizer.pt").write_bytes(data)
    for name in ("finished.json", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    capsys.readouterr()
    assert caption.train(run) == 0
    output = capsys.readouterr().out
    assert "skipped a damaged checkpoint" in output and "optimizer.pt differs" in output
    assert f"resuming from {newest.with_name('checkpoint-4')}" in output
    same_bits(before, weights(tmp_path / "run"))
    assert checkpoints.damage(newest) is None  # written anew


def test_interrupt_saves_and_says_how_to_go_on(settings, tmp_path):
    run = settings(max_steps=400, save_every=1000, eval_every=1000, log_every=1)
    process = run_command(run)
    deadline = time.monotonic() + 240
    while last_step(tmp_path / "run") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert "interrupted: saved at step" in output and "run the same command again to resume" in output
    assert "Traceback" not in output
    newest, damaged = checkpoints.newest_verified(tmp_path / "run" / "checkpoints")
    assert newest is not None and damaged == [] and not (tmp_path / "run" / "finished.json").exists()


def test_early_stop_is_remembered(settings, tmp_path, capsys):
    """A learning rate of zero never gets better: the second validation stops it, also after a kill behind its save."""
    run = settings(learning_rate=1e-30, weight_decay=0.0, max_steps=40, eval_every=2, save_every=2, patience=2)
    caption.train(run)
    steps = json.loads((tmp_path / "run" / "finished.json").read_text())["steps"]
    assert steps == 6  # the first is the best so far, then two without a better one
    os.remove(tmp_path / "run" / "finished.json")
    before = weights(tmp_path / "run")
    assert caption.train(run) == 0
    assert json.loads((tmp_path / "run" / "finished.json").read_text())["steps"] == 6
    same_bits(before, weights(tmp_path / "run"))
