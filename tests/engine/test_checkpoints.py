"""Checkpoints are complete or absent, verified before use, and damaged ones are named and passed over."""

import os
import signal
import subprocess
import sys
import time

import pytest

from blipren.training.engine import checkpoints


def write(parent, step, content=b"weights"):
    with checkpoints.complete_or_absent(parent / f"checkpoint-{step}") as staging:
        (staging / "model.safetensors").write_bytes(content)
        (staging / "adapter").mkdir()
        (staging / "adapter" / "adapter.safetensors").write_bytes(content * 2)
    return parent / f"checkpoint-{step}"


def test_newest_verified_is_taken(tmp_path):
    for step in (9, 100, 20):
        write(tmp_path, step)
    newest, passed_over = checkpoints.newest_verified(tmp_path)
    assert newest.name == "checkpoint-100" and passed_over == []
    assert checkpoints.newest_verified(tmp_path / "nowhere") == (None, [])


def flip_a_bit(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "differs from its checksum": flip_a_bit,
    "has 3 bytes instead of 7": lambda folder: os.truncate(folder / "model.safetensors", 3),
    "adapter/adapter.safetensors is missing": lambda folder: (folder / "adapter" / "adapter.safetensors").unlink(),
    "no manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json is unreadable": lambda folder: (folder / "manifest.json").write_text("{"),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_damaged_checkpoint_is_named_and_passed_over(tmp_path, reason):
    good, bad = write(tmp_path, 10), write(tmp_path, 20)
    DAMAGES[reason](bad)
    newest, passed_over = checkpoints.newest_verified(tmp_path)
    assert newest == good
    assert [d.folder for d in passed_over] == [bad]
    assert reason in str(passed_over[0]) and str(bad) in str(passed_over[0])


def test_empty_checkpoint_folder_is_passed_over(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    newest, passed_over = checkpoints.newest_verified(tmp_path)
    assert newest is None and passed_over[0].reason == "no manifest.json"


def test_failed_save_leaves_the_old_checkpoint(tmp_path):
    folder = write(tmp_path, 10, b"old----")
    with pytest.raises(RuntimeError, match="disk"):
        with checkpoints.complete_or_absent(folder) as staging:
            (staging / "model.safetensors").write_bytes(b"new")
            raise RuntimeError("disk full")
    assert (folder / "model.safetensors").read_bytes() == b"old----"
    assert checkpoints.damage(folder) is None
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-10"]


def test_rewriting_replaces(tmp_path):
    write(tmp_path, 10, b"old----")
    folder = write(tmp_path, 10, b"newer--")
    assert (folder / "model.safetensors").read_bytes() == b"newer--" and checkpoints.damage(folder) is None
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-10"]


def test_prune_keeps_the_newest(tmp_path):
    for step in (1, 2, 10, 11):
        write(tmp_path, step)
    (tmp_path / "best-2").mkdir()
    checkpoints.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best-2", "checkpoint-10", "checkpoint-11"]


WRITER = """
import sys, pathlib
from blipren.training.engine import checkpoints
parent = pathlib.Path(sys.argv[1])
for step in range(1, 100000):
    with checkpoints.complete_or_absent(parent / f"checkpoint-{step}") as staging:
        for part in range(20):
            (staging / f"part-{part}").write_bytes(bytes([step % 251]) * 20000)
    checkpoints.prune(parent, 2)
"""


def test_kill_at_any_moment_leaves_a_verified_checkpoint(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "checkpoint-3").exists() and not (tmp_path / "checkpoint-4").exists():
            assert writer.poll() is None and time.monotonic() < deadline, (
                "the writer never got to its third checkpoint"
            )
            time.sleep(0.005)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    newest, passed_over = checkpoints.newest_verified(tmp_path)
    assert passed_over == [] and newest is not None
    step = checkpoints.step_of(newest)
    assert {(newest / f"part-{i}").read_bytes()[0] for i in range(20)} == {step % 251}
    checkpoints.clear_unfinished(tmp_path)
    assert all(p.name.startswith("checkpoint-") for p in tmp_path.iterdir())
