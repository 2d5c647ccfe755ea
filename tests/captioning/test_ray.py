"""The Ray engine writes the files of the local one, also when an actor and the driver are killed."""

import os
import shutil

import pytest

from blipren.training.commands.caption import CaptionSettings
from tests.captioning.conftest import caption_in_actor
from tests.captioning.test_dataset import content
from tests.captioning.test_restart import marks, run


def test_killed_actor_and_driver_change_nothing(seeing, pictures, tmp_path):
    pytest.importorskip("ray", reason="the Ray engine's extra is not installed")
    pytest.importorskip("psutil")
    from tests.data.ray_kills import run_with_kills, start_ray

    out = tmp_path / "out"

    def drive():
        start_ray()
        os._exit(run(seeing, pictures, out, "--engine", "ray", "--actors", "1"))

    run_with_kills(drive, "CaptionUnits", lambda: marks(out))
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
