"""The Ray engine gives the cache of the local one, byte for byte: after kills, and on another file system."""

import os

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest

from blipren.training.commands.embed import EmbedSettings
from blipren.training.commands.embed import run as embed
from blipren.training.data.cache import FeatureCache
from blipren.training.data.cache.engines import ray_cluster
from tests.data.tools import encoded, picture, run_embed

OPTIONS = {
    "rows_per_shard": 2,
    "batch_size": 2,
    "device": "cpu",
    "validation_share": 0.2,
    "test_share": 0.2,
    "workers": 0,
}


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """Forty-eight rows in three files, some broken, some twice."""
    folder = tmp_path_factory.mktemp("parquet")
    for part in range(3):
        rows = range(16 * part, 16 * part + 16)
        images = [encoded(picture(i if i % 9 else 0, (120, 90)), "JPEG", quality=95 - i) for i in rows]
        images = [data[:150] if i % 13 == 5 else data for i, data in zip(rows, images)]
        columns = {"jpg": images, "caption": [f"picture {i} of many" for i in rows], "key": [f"{i:04d}" for i in rows]}
        pyarrow.parquet.write_table(pa.table(columns), folder / f"{part:05d}.parquet")
    return folder


@pytest.fixture(scope="module")
def local(tmp_path_factory, tiny_model, parquet):
    cache = run_embed(tiny_model, f"{parquet}/*.parquet", tmp_path_factory.mktemp("local") / "c", **OPTIONS)
    assert cache.counts["rows"] == 48 and 0 < cache.counts["rejected"] < 12
    return cache


def test_killed_workers_and_driver_change_nothing(tmp_path, tiny_model, parquet, local):
    pytest.importorskip("ray", reason="the Ray engine's extra is not installed")
    pytest.importorskip("psutil")
    from tests.data.ray_kills import run_with_kills, start_ray

    path = tmp_path / "c"

    def drive():
        start_ray()
        settings = EmbedSettings(
            model=str(tiny_model), dataset=f"{parquet}/*.parquet", cache=str(path), engine="ray", actors=1, **OPTIONS
        )
        os._exit(embed(settings) or 0)  # Ray's processes end with their driver

    run_with_kills(drive, "EmbedUnits", lambda: len(list((path / "units").glob("[0-9]*.json"))))
    cache = FeatureCache.open(path)
    assert cache.info["content_hash"] == local.info["content_hash"] and not cache.verify()
    for split in ("train", "validation", "test"):
        assert cache.split(split).to_list() == local.split(split).to_list()


def test_a_cache_on_another_file_system(tmp_path, tiny_model, parquet, local, monkeypatch):
    """Units embedded by the actors' own class in this process: a file system in memory has no other."""
    memory = fsspec.filesystem("memory")
    memory.put(str(parquet), "/photos", recursive=True)
    ran = []

    def run_here(s, job, units):
        actor = ray_cluster.EmbedUnits({name: getattr(s, name) for name in s.__dataclass_fields__})
        for number in units:
            ran.append(number)
            if len(ran) == 4:
                raise KeyboardInterrupt
            actor({"unit": [number]})

    monkeypatch.setattr(ray_cluster, "_run", run_here)
    settings = EmbedSettings(
        model=str(tiny_model), dataset="memory://photos/*.parquet", cache="memory://cache", engine="ray", **OPTIONS
    )
    try:
        with pytest.raises(KeyboardInterrupt):
            embed(settings)
        assert not memory.exists("/cache/cache.json")
        assert embed(settings) is None and ran == [*range(4), *range(3, 24)]
        memory.get("/cache/", str(tmp_path / "c"), recursive=True)
        cache = FeatureCache.open(tmp_path / "c")
        assert cache.info["shards"] == local.info["shards"] and cache.counts == local.counts
        assert not cache.verify()
        assert cache.split("train").to_list() == local.split("train").to_list()
        embed(settings)
        assert len(ran) == 25
    finally:
        memory.rm("/cache", recursive=True)
        memory.rm("/photos", recursive=True)
