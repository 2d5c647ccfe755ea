"""The folder of a training run: settings, environment, one JSON line an event, curves as JSON and PNG.

OUT/                    the model (written at the end)
OUT/checkpoints/        checkpoint-N to resume from, best-N the best model so far
OUT/settings.yaml       the settings; the same command resumes the run, one with other settings is refused
OUT/environment.json    versions, machine, command
OUT/log.jsonl           training, validation and sample captions, in order
OUT/curves.json, .png   loss, learning rate and metrics over steps
OUT/finished.json       the summary of a finished run
"""

import dataclasses
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import yaml

from blipren.training.engine.checkpoints import clear_unfinished
from blipren.training.errors import UserError
from blipren.training.files import write_atomically
from blipren.training.settings import Settings

# Settings that may differ between a run and its continuation, since the weights do not depend on them.
FREE_SETTINGS = {
    "out", "device", "workers", "log_every", "save_every", "keep_checkpoints", "report_to", "full", "fsdp", "deepspeed",
    "push_to", "public",
}  # fmt: skip
PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "numpy")


def environment() -> dict:
    """Return what a run depends on besides its settings: command, versions, machine."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


class RunFolder:
    """Paths and files of a run. Only the first process writes; the others pass `writes=False`."""

    def __init__(self, out: str | Path, writes: bool = True):
        self.path = Path(out)
        self.writes = writes
        self.checkpoints = self.path / "checkpoints"
        self.log_path = self.path / "log.jsonl"
        self.finished_path = self.path / "finished.json"

    def check(self, settings: Settings) -> None:
        """Raise `UserError` if the folder holds a run with other settings, or something that is no run."""
        if not self.writes:
            return
        now = dataclasses.asdict(settings)
        settings_path = self.path / "settings.yaml"
        if settings_path.is_file():
            before = yaml.safe_load(settings_path.read_text())
            differing = [k for k in now if k not in FREE_SETTINGS and before.get(k, now[k]) != now[k]]
            if differing:
                name = differing[0]
                raise UserError(
                    f"{self.path} holds a run with {name} {before[name]!r}, not {now[name]!r}: give the same settings "
                    "to resume it, or another folder for a new run"
                )
        elif self.path.is_dir() and any(p for p in self.path.iterdir() if not p.name.startswith(".")):
            raise UserError(f"{self.path} is not empty and holds no run: give another folder")

    def claim(self, settings: Settings) -> None:
        """Make the folder this run's: write settings and environment. Raises `UserError` as `check` does."""
        self.check(settings)
        if not self.writes:
            return
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        clear_unfinished(self.checkpoints)
        write_atomically(self.path / "settings.yaml", yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False))
        write_atomically(self.path / "environment.json", json.dumps(environment(), indent=1) + "\n")

    def finished(self) -> dict | None:
        """Return the summary of the finished run, or None."""
        return json.loads(self.finished_path.read_text()) if self.finished_path.is_file() else None

    def finish(self, summary: dict) -> None:
        """Write the summary, which makes the run a finished one."""
        if self.writes:
            write_atomically(self.finished_path, json.dumps(summary, indent=1) + "\n")

    def events(self) -> list[dict]:
        """Return the lines of the log, without one that a killed process cut short."""
        if not self.log_path.is_file():
            return []
        found = []
        for line in self.log_path.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found

    def rewind(self, step: int) -> None:
        """Remove the lines after `step`, which the run resumes from: they will be logged again."""
        if self.writes:
            kept = [event for event in self.events() if event["step"] <= step]
            write_atomically(self.log_path, "".join(json.dumps(event) + "\n" for event in kept))

    def log(self, kind: str, step: int, **values) -> None:
        """Append {"kind", "step", ...} to the log."""
        if self.writes:
            with open(self.log_path, "a") as file:
                file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")

    def draw_curves(self) -> None:
        """Write curves.json and curves.png from the log."""
        if not self.writes:
            return
        curves: dict[str, list[list[float]]] = {}
        for event in self.events():
            if event["kind"] in ("train", "validation"):
                for name, value in event.items():
                    if name not in ("kind", "step", "epoch") and isinstance(value, int | float):
                        curves.setdefault(f"{event['kind']} {name}", []).append([event["step"], value])
        write_atomically(self.path / "curves.json", json.dumps(curves, indent=1) + "\n")
        draw_panels(curves, self.path / "curves.png")


PANELS = {
    "loss": ["train loss", "validation loss"],
    "CIDEr": ["validation CIDEr"],
    "stage 1": ["train itc", "train itm", "train itg"],
    "recall": ["validation recall", "validation i2t_R@1", "validation t2i_R@1", "validation chance"],
    "in-batch accuracy": ["train itc_accuracy", "train itm_accuracy"],
    "temperature": ["train temperature"],
    "learning rate": ["train learning_rate"],
    "gradient norm": ["train grad_norm"],
    "answer tokens/s": ["train tokens_per_second"],
}


def draw_panels(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Draw a panel for each quantity over the steps. A panel without points is left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {title: [n for n in names if n in curves] for title, names in PANELS.items()}
    experts = [name for name in curves if name.startswith("train expert")]
    panels = {title: names for title, names in panels.items() if names} | ({"expert load": experts} if experts else {})
    if not panels:
        return
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), squeeze=False, layout="constrained")
    for axis, (title, names) in zip(axes[0], panels.items()):
        for name in names:
            steps, values = zip(*curves[name])
            axis.plot(steps, values, marker="o" if len(steps) < 30 else None, markersize=3, label=name)
        axis.set_title(title)
        axis.set_xlabel("step (optimizer updates)")
        if len(names) > 1:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
