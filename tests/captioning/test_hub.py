"""A data set on the Hub is captioned by its id: the loopback Hub, the real client and the real `datasets` library."""

import datasets
import pytest
from huggingface_hub import HfApi

from blipren.training.cli import main
from tests.captioning.conftest import COLOURS
from tests.data.tools import encoded
from tests.evaluation.conftest import colour_picture
from tests.hub.conftest import hub  # noqa: F401
from tests.hub.loopback.connection import TOKEN

REPO = "user/colours"


@pytest.fixture
def published(hub, monkeypatch, tmp_path):  # noqa: F811
    """A data set of six pictures in two splits on the loopback Hub, one of them broken."""
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "library")
    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo(REPO, repo_type="dataset")
    for split, numbers in {"train": range(4), "test": range(4, 6)}.items():
        images = [{"bytes": encoded(colour_picture(i), "PNG") if i != 2 else b"\0" * 40} for i in numbers]
        rows = datasets.Dataset.from_dict({"image": images, "name": [f"n{i}" for i in numbers]})
        path = tmp_path / f"{split}.parquet"
        rows.cast_column("image", datasets.Image()).to_parquet(path)
        api.upload_file(
            path_or_fileobj=path,
            path_in_repo=f"data/{split}-00000-of-00001.parquet",
            repo_id=REPO,
            repo_type="dataset",
        )
    return hub


def test_a_data_set_is_captioned_by_its_hub_id(published, seeing, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["caption", str(seeing), REPO, "--out", str(out), "--device", "cpu", "--workers", "0"]) == 0
    assert "6 rows = 5 captioned + 1 rejected" in capsys.readouterr().out
    loaded = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "found"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 3, "test": 2}
    for row in (row for rows in loaded.values() for row in rows):
        assert list(COLOURS)[int(row["name"][1:])] in row["caption"] and row["image"].size == (40, 32)
    assert any("/data/train-00000-of-00001.parquet" in path for _, path in published.requests)
    assert main(["caption", str(seeing), "user/nothing", "--out", str(tmp_path / "x"), "--device", "cpu"]) == 1
    assert "user/nothing: no data set could be opened there" in capsys.readouterr().err
