"""The Ray engine gives the cache of the local one, byte for byte: after kills, and on another file system."""

import multiprocessing
import os
import time

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


def drive(model, data, path):
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
    settings = EmbedSettings(model=str(model), dataset=data, cache=str(path), engine="ray", actors=1, **OPTIONS)
    os._exit(embed(settings) or 0)  # Ray's processes end with their driver


def marks(path) -> int:
    return len(list((path / "units").glob("[0-9]*.json")))


def wait_for(count: int, path, child, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while marks(path) < count and child.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_killed_workers_and_driver_change_nothing(tmp_path, tiny_model, parquet, local):
    pytest.importorskip("ray", reason="the Ray engine's extra is not installed")
    psutil = pytest.importorskip("psutil")
    path = tmp_path / "c"
    fork = multiprocessing.get_context("fork")
    killed = []
    for turn in range(2):
        child = fork.Process(target=drive, args=(tiny_model, f"{parquet}/*.parquet", path))
        child.start()
        try:
            if turn == 0:
                wait_for(1, path, child)
                assert child.is_alive(), f"the driver ended with status {child.exitcode} before it could be killed"
                for process in psutil.Process(child.pid).children(recursive=True):
                    if "EmbedUnits" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
                wait_for(marks(path) + 1, path, child)
                child.kill()
            child.join(300)
        finally:
            if child.is_alive():
                child.kill()
    assert killed and child.exitcode == 0
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
