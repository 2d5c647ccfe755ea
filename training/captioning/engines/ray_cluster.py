"""Captioning on a Ray cluster: the units of the data set are a Ray data set, which a pool of actors captions.

Each actor opens data and model by the same settings and captions whole units with the code of the local engine, or of
vLLM's, so that the files are the same. The unit of a killed actor is given to another one. After a killed driver, the same command
captions the units that are not marked as done. With several nodes, OUT has to be on a file system that all of them see.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

from blipren.training.captioning.job import CaptionJob
from blipren.training.commands.caption import CaptionSettings
from blipren.training.data.cache.engines.ray_cluster import ray_session, run_units
from blipren.training.data.cache.writer.lock import CacheLock
from blipren.training.engine.memory import keep_freed_memory
from blipren.training.errors import UserError


class CaptionUnits:
    """Actor with a model on its device; it takes numbers of units.

    Args:
        settings: of the command. folder: the driver's working directory, so that names of data mean the same here.
    """

    def __init__(self, settings: dict[str, Any], folder: str):
        keep_freed_memory()  # an actor is a process of its own
        with contextlib.suppress(FileNotFoundError):  # on a node without it, absolute paths and URLs can be read
            os.chdir(folder)
        settings = settings | {"engine": settings["actor_engine"], "actor_engine": "local"}
        with contextlib.redirect_stdout(None):
            self.job = CaptionJob.open(CaptionSettings(**settings))
        self.out = Path(self.job.settings.out)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for number in batch["unit"]:
            folder = self.job.folder(self.out)
            if not folder.is_done(int(number)):
                self.job.caption_units(folder, only=int(number))
        return batch


def absolute(s: CaptionSettings) -> CaptionSettings:
    """Return settings with absolute paths of models and OUT. Names of images stay: they are written into the data set."""
    models = {name: getattr(s, name) for name in ("model", "matching_model")}
    found = {name: os.path.abspath(path) for name, path in models.items() if path and Path(path).exists()}
    return dataclasses.replace(s, **found, out=os.path.abspath(s.out))


def caption_with_ray(s: CaptionSettings, job: CaptionJob) -> None:
    """Caption with a pool of actors. Raises `UserError` as the local engine does."""
    path = Path(s.out)
    with CacheLock(path):
        out = job.folder(path)
        if out.is_complete():
            print(f"{path} is complete: nothing to caption")
            return
        out.start()
        units = [
            number for number in range(-(-job.source.count_rows() // s.rows_per_shard)) if not out.is_done(number)
        ]
        if units:
            with ray_session() as ray:
                run_units(ray, CaptionUnits, absolute(s), units, os.getcwd())
        missing = [number for number in units if not out.is_done(number)]
        if missing:
            raise UserError(f"{len(missing)} units have no captions, such as {missing[0]}: run the same command again")
        job.complete(out)
