"""A writer that is killed, meets a full disk or another writer: the cache is the same in the end."""

import json
import multiprocessing
import os
import random
import resource
import time

import pytest

from blipren.training.data.cache import FeatureCache
from blipren.training.data.cache.writer.lock import CacheLock
from blipren.training.errors import UserError
from tests.data.tools import encoded, picture, run_embed, write_folder

fork = multiprocessing.get_context("fork")
OPTIONS = {"rows_per_shard": 8, "batch_size": 4, "dtype": "float32", "validation_share": 0.15, "test_share": 0.15}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eighty images of which some are broken and some twice, so that rejection and the end have work to do."""
    rows, files = [], {}
    for i in range(80):
        data = encoded(picture(i if i % 10 else 0, (200, 160)), "JPEG", quality=95 - i // 2)
        files[f"{i:02d}.jpg"] = data[:200] if i % 17 == 3 else data
        rows.append(
            {"file_name": f"{i:02d}.jpg", "captions": [f"picture {i} of many", "<p>no</p>"]}
            | ({"split": "test"} if i == 30 else {})
        )
    return write_folder(tmp_path_factory.mktemp("photos"), rows, files)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, tiny_model, folder):
    started = time.monotonic()
    cache = run_embed(tiny_model, folder, tmp_path_factory.mktemp("reference") / "c", **OPTIONS)
    assert 0 < cache.counts["rejected"] < 30
    return cache, time.monotonic() - started


def marks(folder) -> dict[str, int]:
    """Each finished unit, with the time at which its rows were embedded."""
    files = sorted((folder / "units").glob("[0-9]*.json"))
    return {file.name: (folder / "index" / f"{file.stem}.arrow").stat().st_mtime_ns for file in files}


def embed_in_child(model, folder, path, options, limit=None):
    os.setpgid(0, 0)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        run_embed(model, folder, path, **options)
    except UserError as error:
        (path.parent / "message.txt").write_text(str(error)[:4000])
        os._exit(1)
    os._exit(0)


def kill_until_done(model, folder, path, reference, kills: int, seed: int):
    """Kill a writer at random moments, then lets one finish."""
    expected, seconds = reference
    rng = random.Random(seed)
    seen = 0
    for kill in range(kills):
        before = marks(path)
        child = fork.Process(target=embed_in_child, args=(model, folder, path, {**OPTIONS, "workers": kill % 2}))
        child.start()
        time.sleep(rng.uniform(0.05, 1.0) * seconds)
        seen += child.is_alive()
        child.kill()
        child.join()
        after = marks(path)
        assert {name: after[name] for name in before} == before, "a finished unit was redone"
        begun = {int(file.name[5:10]) for file in path.glob("*/data-0*.arrow*")}
        unmarked = begun - {int(name[:5]) for name in after}
        assert len(unmarked) <= 1, f"units {unmarked} would be redone"
        if not (path / "cache.json").exists():
            with pytest.raises(UserError, match="not finished|not a feature cache"):
                FeatureCache.open(path)
    cache = run_embed(model, folder, path, **OPTIONS)
    assert cache.info["content_hash"] == expected.info["content_hash"]
    assert cache.info["counts"] == expected.info["counts"]
    assert not cache.verify() and not list(path.rglob("*.tmp"))
    for split in ("train", "validation", "test"):
        stored = {file.name for file in (path / split).glob("data-*.arrow")}
        assert stored == {record["file"] for record in cache.info["shards"][split]}
    return seen


def test_kill_at_random_moments(tmp_path, tiny_model, folder, reference):
    assert kill_until_done(tiny_model, folder, tmp_path / "c", reference, kills=3, seed=1) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_kill_at_twenty_random_moments(tmp_path, tiny_model, folder, reference, seed):
    kill_until_done(tiny_model, folder, tmp_path / "c", reference, kills=4, seed=100 + seed)


@pytest.mark.parametrize("place", ["remove_rows", "write_dataset_files", "remaining"])
def test_kill_at_the_end_is_taken_up_too(tmp_path, tiny_model, folder, reference, monkeypatch, place):
    """The moments that random kills seldom hit: while duplicates are removed, before the last files."""
    from blipren.training.data.cache.writer import finish, units

    class Killed(BaseException):
        pass

    calls = []

    def dying(original, when):
        def wrapper(*args, **kwargs):
            result = original(*args, **kwargs) if when == "after" else None
            calls.append(1)
            if len(calls) == 2 or when == "before":
                raise Killed
            return original(*args, **kwargs) if when != "after" else result

        return wrapper

    path = tmp_path / "c"
    if place == "remove_rows":
        monkeypatch.setattr(units.CacheWriter, place, dying(units.CacheWriter.remove_rows, "second"))
    elif place == "write_dataset_files":
        monkeypatch.setattr(finish, place, dying(finish.write_dataset_files, "before"))
    else:
        monkeypatch.setattr(units.UnitWriter, "finish", dying(units.UnitWriter.finish, "second"))
    try:
        with pytest.raises(Killed):
            run_embed(tiny_model, folder, path, **OPTIONS)
    finally:
        monkeypatch.undo()
    assert not (path / "cache.json").exists()
    assert run_embed(tiny_model, folder, path, **OPTIONS).info["content_hash"] == reference[0].info["content_hash"]


def test_kill_before_the_first_file_is_taken_up_too(tmp_path, tiny_model, folder, reference):
    (tmp_path / "c" / "units").mkdir(parents=True)
    (tmp_path / "c" / "units" / ".fingerprint.json.tmp").write_text("{")
    cache = run_embed(tiny_model, folder, tmp_path / "c", **OPTIONS)
    assert cache.info["content_hash"] == reference[0].info["content_hash"]


def test_a_unit_that_a_power_cut_damaged_is_redone(tmp_path, tiny_model, folder, reference, capsys):
    path = tmp_path / "c"
    child = fork.Process(target=embed_in_child, args=(tiny_model, folder, path, {**OPTIONS, "limit": None}))
    child.start()
    deadline = time.monotonic() + 60
    while len(marks(path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    child.kill()
    child.join()
    if (path / "cache.json").exists():
        (path / "cache.json").unlink()
    newest = max(marks(path))
    record = json.loads((path / "units" / newest).read_text())
    split, shard = next(iter(record["shards"].items()))
    os.truncate(path / split / shard["file"], 100)
    cache = run_embed(tiny_model, folder, path, **OPTIONS)
    assert "was not completely on the disk" in capsys.readouterr().out
    assert cache.info["content_hash"] == reference[0].info["content_hash"]


def test_a_full_disk_is_said_and_gone_on_from(tmp_path, tiny_model, folder, reference):
    path = tmp_path / "c"
    options = {**OPTIONS, "rows_per_shard": 24}
    child = fork.Process(target=embed_in_child, args=(tiny_model, folder, path, options, 20_000))
    child.start()
    child.join(120)
    assert child.exitcode == 1
    message = (tmp_path / "message.txt").read_text()
    assert "no space left for" in message and "run the same command again" in message
    assert not list(path.glob("*/*.arrow")) and not (path / "cache.json").exists() and not marks(path)
    full = run_embed(tiny_model, folder, path, **options)
    assert full.counts == reference[0].counts and not full.verify()


def hold(path, ready, seconds):
    with CacheLock(path):
        ready.set()
        time.sleep(seconds)


def test_a_second_writer_says_so_and_waits(tmp_path, tiny_model, folder, reference, capsys):
    ready = fork.Event()
    child = fork.Process(target=hold, args=(tmp_path / "c", ready, 1.0))
    child.start()
    assert ready.wait(30)
    with pytest.raises(UserError, match="another process is still writing"):
        with CacheLock(tmp_path / "c", wait=0.1):
            pass
    cache = run_embed(tiny_model, folder, tmp_path / "c", **OPTIONS)
    child.join()
    assert "another process is writing" in capsys.readouterr().out
    assert cache.info["content_hash"] == reference[0].info["content_hash"]


def test_a_killed_writer_leaves_no_workers(tmp_path, tiny_model, folder):
    """An orphan would hold the lock and memory for ever."""
    child = fork.Process(target=embed_in_child, args=(tiny_model, folder, tmp_path / "c", {**OPTIONS, "workers": 2}))
    child.start()
    deadline = time.monotonic() + 60
    while not marks(tmp_path / "c") and time.monotonic() < deadline:
        time.sleep(0.01)
    child.kill()
    child.join()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(child.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("worker processes outlived their killed writer")
