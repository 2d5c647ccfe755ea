"""Checks of what a command's arguments name, before torch is imported.

Only what is surely wrong is refused: a name that may be on the Hub is left to the Hub.
"""

import ast
import glob
import re
from pathlib import Path

from blipren.training.checkpoint_config import read_config
from blipren.training.errors import UsageError, UserError

HUB_NAME = r"\w[\w.-]*"
# files that libraries open by themselves; pictures are opened row by row
DATA_SUFFIXES = (".parquet", ".arrow", ".tar", ".jsonl", ".json", ".csv")
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
    ".jp2",
    ".ico",
    ".tga",
    ".ppm",
)
ROOT = Path(__file__).parent.parent


def split_weights(spec: str) -> list[tuple[str, float | None]]:
    """Return the names in `A=2,B` with their weights; a name without a weight has None.

    Raises:
        UsageError: a weight is no number above 0, or a name is empty.
    """
    if Path(spec).exists():
        return [(spec, None)]
    parts: list[tuple[str, float | None]] = []
    for part in map(str.strip, spec.split(",")):
        name, sign, weight = part.rpartition("=")
        if not sign or Path(part).exists():
            name, weight = part, None
        try:
            parts.append((name, None if weight is None else float(weight)))
        except ValueError:
            raise UsageError(f"{part!r} is not NAME=WEIGHT: {weight!r} is no number") from None
        if not name or (weight is not None and parts[-1][1] <= 0):
            raise UsageError(f"{part!r} is not NAME or NAME=WEIGHT with a weight above 0")
    return parts


def check_checkpoint(name: str) -> None:
    """Raise `UserError` unless `name` is a folder with a checkpoint of ours, or may be one on the Hub (user/name)."""
    if Path(name).exists():
        read_config(Path(name))
    elif not re.fullmatch(rf"{HUB_NAME}/{HUB_NAME}", name):
        raise UserError(
            f"no checkpoint at {name}: there is no such folder, and an id on the Hub is user/name; "
            "make one with `blipren new`"
        )


def check_base_model(name: str) -> None:
    """Raise `UserError` unless `name` is a folder, or may be a model on the Hub: [user/]name[@revision]."""
    if not Path(name).is_dir() and not re.fullmatch(rf"({HUB_NAME}/)?{HUB_NAME}(@[\w./-]+)?", name):
        raise UserError(f"there is no folder {name}; give a folder, or an id of a model on the Hub")


def check_cache(spec: str) -> None:
    """Raise `UserError` unless every folder of `CACHE` or `CACHE=2,OTHER=1` is a finished feature cache."""
    for name, _ in split_weights(spec):
        check_cache_folder(Path(name))


def check_cache_folder(folder: Path) -> None:
    """Raise `UserError` unless the folder is a finished feature cache."""
    if not (folder / "cache.json").exists():
        if (folder / "units").exists():
            raise UserError(f"{folder} is not finished: run `blipren embed` again, which goes on where it stopped")
        raise UserError(f"{folder} is not a feature cache (no cache.json); make one with `blipren embed`")


def check_dataset(spec: str) -> None:
    """Raise `UserError` unless every name in `spec` is here, is a URL, or may be a data set on the Hub: [user/]name."""
    for name, _ in split_weights(spec):
        on_hub = re.fullmatch(rf"({HUB_NAME}/)?{HUB_NAME}", name) and Path(name).suffix not in DATA_SUFFIXES
        if not (Path(name).exists() or glob.glob(name, recursive=True) or "://" in name or on_hub):
            raise UserError(f"{name} does not exist; give a folder, files, or the id of a data set on the Hub")


def is_dataset(name: str) -> bool:
    """Return whether `name` is a data set or feature cache, and no image file or folder of nothing but images.

    What is not here is a data set on the Hub, a pattern or an address, unless its name ends like that of an image file.
    """
    path = Path(name)
    if path.is_dir():
        marks = {"cache.json", "dataset_dict.json", "state.json", *METADATA_FILES}
        places = [path, *(child for child in path.iterdir() if child.is_dir())]
        if any((place / mark).exists() for place in places for mark in marks):
            return True
        return any(file.suffix in (".parquet", ".arrow", ".tar") for file in path.rglob("*"))
    return path.suffix.lower() not in IMAGE_SUFFIXES and (path.suffix in DATA_SUFFIXES or not path.exists())


def check_evaluation(name: str) -> None:
    """Raise `UserError` unless `name` is a folder that `blipren evaluate` has finished."""
    for file in ("metrics.json", "predictions.jsonl"):
        if not (Path(name) / file).is_file():
            raise UserError(f"{name} is not a finished evaluation: it has no {file}; make one with `blipren evaluate`")


def check_files(*names: str) -> None:
    """Raise `UserError` unless all these are files that are there."""
    for name in names:
        if not Path(name).exists():
            raise UserError(f"there is no file {name}")
        if not Path(name).is_file():
            raise UserError(f"{name} is a folder, pipe, socket or device; give a file")


def constructor_arguments(file: str, class_name: str) -> list[str]:
    """Return the names of the arguments that a class of a file at the root takes, read from its source."""
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    (chosen,) = (node for node in body if isinstance(node, ast.ClassDef) and node.name == class_name)
    (init,) = (node for node in chosen.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return [argument.arg for argument in (*init.args.args, *init.args.kwonlyargs) if argument.arg != "self"]
