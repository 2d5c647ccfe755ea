"""A command that is killed at any moment and run again writes the data set of an undisturbed one."""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import time

import pytest

from blipren.training.cli import main
from tests.captioning.test_dataset import OPTIONS, content

fork = multiprocessing.get_context("fork")


def run(model, data, out, *more) -> int:
    return main(["caption", str(model), str(data), "--out", str(out), *OPTIONS, "--rows-per-shard", "3", *more])


def run_in_child(model, data, out, *more, limit=None):
    """Run in a process of its own; `limit` is the largest file, as if the disk were full, and errors go to a file."""
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with (out.parent / "message.txt").open("w") as file, contextlib.redirect_stderr(file):
        status = run(model, data, out, *more)
    os._exit(status)


def marks(out) -> int:
    return len(list((out / ".units").glob("[0-9]*.json")))


def kill_until_done(model, data, folder, kills: int, seed: int) -> None:
    assert run(model, data, folder / "reference") == 0
    rng, seen, out = random.Random(seed), 0, folder / "out"
    for kill in range(kills):
        child = fork.Process(target=run_in_child, args=(model, data, out, "--workers", str(kill % 2)))
        child.start()
        before = marks(out)
        more = rng.randrange(3)
        while child.is_alive() and marks(out) < before + more:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        seen += child.is_alive()
        child.kill()
        child.join()
    assert seen, "no run was killed"
    assert run(model, data, out) == 0
    assert content(out) == content(folder / "reference")
    counts = json.loads((out / "captions.json").read_text())["counts"]
    assert (counts["rows"], counts["captioned"], counts["rejected"]) == (22, 20, 2)


def test_kill_at_random_moments(seeing, pictures, tmp_path):
    kill_until_done(seeing, pictures, tmp_path, kills=3, seed=0)


@pytest.mark.slow
def test_kill_at_twenty_random_moments(seeing, pictures, tmp_path):
    kill_until_done(seeing, pictures, tmp_path, kills=20, seed=1)


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_a_full_disk_is_said_and_gone_on_from(form, seeing, pictures, tmp_path):
    out, options = tmp_path / "out", ["--format", form, "--rows-per-shard", "30"]
    child = fork.Process(target=run_in_child, args=(seeing, pictures, out, *options), kwargs={"limit": 1500})
    child.start()
    child.join(120)
    message = (tmp_path / "message.txt").read_text()
    assert child.exitcode == 1 and "no space left for" in message and "Traceback" not in message
    assert not (out / "captions.json").exists() and not marks(out) and not list(out.glob("data/*"))
    assert run(seeing, pictures, out, *options) == 0
