"""Embedding on a Ray cluster: the units of a cache are a Ray data set, which a pool of actors embeds.

A row of the Ray data set is the number of a unit. Each actor opens data and model by the same settings and embeds whole
units with the code of the local engine, so that the cache is the same byte for byte. The unit of a killed actor is given
to another one. After a killed driver, the same command embeds the units that are not marked as done.

DATASET and CACHE may be on any file system that fsspec knows. A remote cache is written through a scratch folder: first
the files of a unit, then its mark.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blipren.training.commands.embed import EmbedSettings
from blipren.training.data.cache.engines.local import embed_units
from blipren.training.data.cache.fingerprints import check_same_fingerprint
from blipren.training.data.cache.job import EmbedJob, reuse_cache
from blipren.training.data.cache.writer.lock import CacheLock
from blipren.training.data.cache.writer.units import CacheWriter
from blipren.training.engine.memory import keep_freed_memory
from blipren.training.errors import UserError


class CachePlace:
    """A cache folder by path or URL, with a local scratch folder where it is remote."""

    def __init__(self, url: str, scratch: Path | None = None):
        import fsspec

        self.url = url
        self.fs, self.root = fsspec.core.url_to_fs(url)
        self.local = "local" in self.fs.protocol or "file" in self.fs.protocol
        self.folder = Path(self.root) if self.local else (scratch or Path(tempfile.mkdtemp(prefix="blipren-embed-")))

    def exists(self, name: str) -> bool:
        return self.fs.exists(f"{self.root}/{name}")

    def pull(self, pattern: str) -> None:
        """Copy remote files into the scratch folder, unless they are there."""
        if self.local:
            return
        for remote in self.fs.glob(f"{self.root}/{pattern}"):
            target = self.folder / str(remote).removeprefix(str(self.root)).lstrip("/")
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                self.fs.get_file(remote, str(target))

    def push(self, path: Path) -> None:
        """Copy a file of the scratch folder to the cache, and give it its name when it is complete."""
        if self.local:
            return
        name = path.relative_to(self.folder).as_posix()
        self.fs.makedirs(f"{self.root}/{name}".rpartition("/")[0], exist_ok=True)
        self.fs.put_file(str(path), f"{self.root}/{name}.tmp")
        self.fs.mv(f"{self.root}/{name}.tmp", f"{self.root}/{name}")

    def clean(self) -> None:
        if not self.local:
            shutil.rmtree(self.folder, ignore_errors=True)


class RemoteCacheWriter(CacheWriter):
    """Writer of a remote cache. Shards are fetched only to remove rows from them."""

    place: CachePlace

    def _check_newest(self) -> None:
        """Check nothing: a mark is written after its files."""

    def remove_rows(self, record: dict[str, Any], rows: dict[int, tuple[str, str]]) -> dict[str, Any]:
        before = {split: shard["file"] for split, shard in record["shards"].items()}
        for split, name in before.items():
            self.place.pull(f"{split}/{name}*")
        record = super().remove_rows(record, rows)
        for path in self.unit_files(record):
            if path.parent.name != "index" and path.name != before.get(path.parent.name):
                self.place.push(path.with_name(path.name + ".sums"))
                self.place.push(path)
        self.place.push(self.unit_path(record["unit"]))
        for split, name in before.items():
            if record["shards"].get(split, {}).get("file") != name:
                for file in (name, f"{name}.sums"):
                    self.place.fs.rm_file(f"{self.place.root}/{split}/{file}")
        return record


class EmbedUnits:
    """Actor with a model on its device; it takes numbers of units."""

    def __init__(self, settings: dict[str, Any]):
        keep_freed_memory()  # an actor is a process of its own
        self.s = EmbedSettings(**settings)
        self.place = CachePlace(self.s.cache)
        if not self.place.local:  # removed with the actor
            self._scratch = weakref.finalize(self, self.place.clean)
        with contextlib.redirect_stdout(None):
            self.job = EmbedJob.open(self.s)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for number in batch["unit"]:
            self.embed(int(number))
        return batch

    def embed(self, number: int) -> None:
        """Embed a unit and mark it as done, unless another actor has."""
        mark = f"units/{number:05d}.json"
        if self.place.exists(mark):
            return
        cache = self.job.writer(self.s, self.place.folder)
        (cache.folder / "units").mkdir(parents=True, exist_ok=True)
        embed_units(
            self.job.settings, self.job.source, self.job.encoder, cache, self.job.config, self.job.scorer, only=number
        )
        path = cache.unit_path(number)
        if self.place.local or not path.exists():
            return
        files = cache.unit_files(json.loads(path.read_text()))
        for file in files:
            self.place.push(file.with_name(file.name + ".sums"))
            self.place.push(file)
        self.place.push(path)
        for file in files:
            file.unlink()
            file.with_name(file.name + ".sums").unlink()


@contextlib.contextmanager
def ray_session() -> Iterator[Any]:
    """Yield Ray, connected to the cluster of `RAY_ADDRESS` or started on this machine."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError("--engine ray needs Ray: pip install 'blipren[ray]'") from error
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()


def embed_with_ray(s: EmbedSettings, job: EmbedJob) -> int | None:
    """Embed with a pool of actors. Raises `UserError` as the local engine does."""
    if "://" not in s.cache:
        s = dataclasses.replace(s, cache=os.path.abspath(s.cache))
    if "://" not in s.dataset and Path(s.dataset).exists():
        s = dataclasses.replace(s, dataset=os.path.abspath(s.dataset))
    if Path(s.model).exists():
        s = dataclasses.replace(s, model=os.path.abspath(s.model))
    place = CachePlace(s.cache)
    lock = CacheLock(place.folder) if place.local else contextlib.nullcontext()
    try:
        with lock:
            return _embed(s, job, place)
    finally:
        place.clean()


def _embed(s: EmbedSettings, job: EmbedJob, place: CachePlace) -> int | None:
    if place.exists("cache.json"):
        if place.local:
            return reuse_cache(place.folder, job)
        stored = json.loads(place.fs.cat_file(f"{place.root}/cache.json"))
        check_same_fingerprint(stored["fingerprint"], job.fingerprint, s.cache)
        print(f"{s.cache} is complete: nothing to embed")
        return None
    place.pull("units/*")
    cache = job.writer(s, place.folder, CacheWriter if place.local else RemoteCacheWriter)
    cache.start()
    if not place.local:
        cache.place = place
        place.push(place.folder / "units" / "fingerprint.json")
    limit = job.settings.limit
    rows = job.source.count_rows() if limit is None else min(limit, job.source.count_rows())
    units = [number for number in range(-(-rows // s.rows_per_shard)) if not cache.is_done(number)]
    if units:
        _run(s, job, units)
    place.pull("units/*")
    missing = [number for number in units if not cache.is_done(number)]
    if missing:
        raise UserError(f"{len(missing)} units were not embedded, such as {missing[0]}: run the same command again")
    place.pull("index/*")
    info = job.finish(s, cache)
    if not place.local:
        for path in sorted(place.folder.rglob("*")):
            small = path.suffix in (".json", ".jsonl") or path.name.startswith("data-empty")
            small |= path.parent.parent.name == "samples"
            if path.is_file() and path.name != "cache.json" and small:
                place.push(path)
        place.push(place.folder / "cache.json")
        print(f"{s.cache}: content {info['content_hash'][:16]}; copy it to a local disk to train from it")
    return None


def _run(s: EmbedSettings, job: EmbedJob, units: list[int]) -> None:
    """Embed the units with the actors. Raises `UserError` for an error of Ray."""
    with ray_session() as ray:
        run_units(ray, EmbedUnits, s, units)


def run_units(ray: Any, actor: type, s: Any, units: list[int], *more: str) -> None:
    """Give the units to a pool of actors.

    Args:
        ray: the library, connected. actor: made of a mapping of settings and `more`; a call takes a batch with the column
            `unit`.
        s: settings with `device`, `actors`, `workers` and `rows_per_shard`.

    Raises:
        UserError: an error of Ray.
    """
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0)) if s.device in ("auto", "cuda") else 0
    cores = int(resources.get("CPU", 1))
    actors = min(len(units), s.actors or gpus or max(1, cores // 4))
    share = {"num_gpus": 1} if gpus else {"num_cpus": max(0.5, min(4.0, cores / actors / 2))}
    print(f"ray: {len(units)} units of {s.rows_per_shard} rows, {actors} actors with {share}")
    settings = dataclasses.asdict(dataclasses.replace(s, workers=0 if s.workers is None else s.workers))
    ray.data.DataContext.get_current().enable_progress_bars = False
    data = ray.data.from_items([{"unit": number} for number in units], override_num_blocks=len(units))
    done = data.map_batches(
        actor,
        fn_constructor_args=(settings, *more),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        **share,
    )
    try:
        for number, _ in enumerate(done.iter_batches(batch_size=1), 1):
            print(f"ray: {number}/{len(units)} units", flush=True)
    except ray.exceptions.RayError as error:
        text = " ".join(str(error).split())
        raise UserError(f"ray: {text[-500:]}") from error


__all__ = ["CachePlace", "EmbedUnits", "embed_with_ray"]
