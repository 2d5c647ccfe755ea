"""`blipren quickstart`: all commands, one after the other, on drawn pictures with the small towers in this folder.

A world (`worlds/NAME.py`) draws its pictures, runs the commands on them and says what came out.
"""

import importlib
import json
import shutil
import time
from pathlib import Path

from blipren.training.commands.quickstart import QuickstartSettings
from blipren.training.errors import UserError
from blipren.training.files import write_atomically

MARK = ".blipren-quickstart"  # a folder with this file is a quickstart's and may be replaced


def prepare_folder(out: Path) -> None:
    """Make OUT, or empty that of an earlier quickstart. Raises `UserError` for any other folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / MARK).is_file():
            raise UserError(f"{out} exists and is not the folder of a quickstart: name another by --out, or remove it")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()


def quickstart(settings: QuickstartSettings) -> None:
    """Build, train, evaluate and use a small model without network or data. Raises `UserError` if a step fails."""
    started = time.perf_counter()
    out = Path(settings.out)
    prepare_folder(out)
    world = importlib.import_module(f"blipren.training.quickstart.worlds.{settings.world}")
    print(f"quickstart: writes everything to {out}; {world.DURATION}")
    summary = world.run_world(settings, out)
    summary["seconds"] = round(time.perf_counter() - started, 1)
    write_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(f"summary   {out / 'summary.json'}\n{summary['seconds']:.0f} s in total")
