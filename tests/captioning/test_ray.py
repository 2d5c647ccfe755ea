"""The Ray engine writes the files of the local one, also when an actor and the driver are killed."""

import multiprocessing
import os
import shutil
import time

import pytest

from blipren.training.commands.caption import CaptionSettings
from tests.captioning.conftest import caption_in_actor
from tests.captioning.test_dataset import content
from tests.captioning.test_restart import marks, run


def drive(model, data, out):
    """A driver in a process of its own; Ray's processes are its children and end with it."""
    import ray

    niceness = {"worker_niceness": 0}  # by default 15: beside another busy test an actor would hardly run
    ray.init(
        num_cpus=1,
        log_to_driver=False,
        include_dashboard=False,
        object_store_memory=100 << 20,
        _system_config=niceness,
    )
    os._exit(run(model, data, out, "--engine", "ray", "--actors", "1"))


def wait_for(count: int, out, child, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while marks(out) < count and child.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_killed_actor_and_driver_change_nothing(seeing, pictures, tmp_path):
    pytest.importorskip("ray", reason="the Ray engine's extra is not installed")
    psutil = pytest.importorskip("psutil")
    fork = multiprocessing.get_context("fork")
    out, killed = tmp_path / "out", []
    for turn in range(2):
        child = fork.Process(target=drive, args=(seeing, pictures, out))
        child.start()
        try:
            if turn == 0:
                wait_for(1, out, child)
                assert child.is_alive(), f"the driver ended with status {child.exitcode} before it could be killed"
                for process in psutil.Process(child.pid).children(recursive=True):
                    if "CaptionUnits" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
                wait_for(marks(out) + 1, out, child)
                child.kill()
            child.join(300)
        finally:
            if child.is_alive():
                child.kill()
    assert killed and child.exitcode == 0
    assert run(seeing, pictures, tmp_path / "local") == 0
    assert content(out) == content(tmp_path / "local")


def test_an_actor_in_another_folder_names_rows_as_the_local_engine(seeing, pictures, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for number in (1, 7, 12, 15):  # 7 and 12 are broken
        shutil.copy(pictures / f"{number:02d}.png", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    assert run(seeing, "photos", tmp_path / "local") == 0
    settings = CaptionSettings(
        model=str(seeing), images=["photos"], out="ray", engine="ray", device="cpu", workers=0, rows_per_shard=3
    )
    caption_in_actor(settings, tmp_path / "elsewhere", monkeypatch)
    assert content(tmp_path / "ray") == content(tmp_path / "local")
    assert '"id": "photos/07.png"' in (tmp_path / "ray" / "rejected.jsonl").read_text()
