"""Checkpoints that are complete or absent.

A checkpoint is written into a hidden folder beside its place, closed by a manifest with every file's size and SHA-256,
flushed to the disk, and renamed. A process killed at any moment leaves the old state or the new one, never a half.
What is read is verified against the manifest first: a damaged checkpoint is named and passed over.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from blipren.training.files import flush_to_disk

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Damaged:
    """A checkpoint that must not be used, and why."""

    folder: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.folder}: {self.reason}"


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Write the size and SHA-256 of every file of `folder` into its manifest, and flush all of them."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        flush_to_disk(path)
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1, sort_keys=True) + "\n")
    flush_to_disk(folder / MANIFEST)
    for path in [p for p in folder.rglob("*") if p.is_dir()] + [folder]:
        flush_to_disk(path)


def damage(folder: Path) -> str | None:
    """Return how `folder` differs from its manifest, or None when it does not."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"no {MANIFEST}"
    try:
        files = json.loads(manifest.read_text())["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is unreadable"
    for name, expected in files:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if file_digest(path) != expected["sha256"]:
            return f"{name} differs from its checksum"
    return None


def staging_folder(folder: Path) -> Path:
    """Return where the checkpoint `folder` is written before it is renamed: a hidden folder, which is no checkpoint."""
    return folder.parent / f".writing-{folder.name}"


def open_staging(folder: Path) -> Path:
    """Make an empty staging folder for the checkpoint `folder`, and return it."""
    staging = staging_folder(folder)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging


def publish_staging(folder: Path) -> None:
    """Write the manifest of the staging folder of `folder` and rename it; an older `folder` is removed."""
    staging = staging_folder(folder)
    write_manifest(staging)
    if folder.exists():
        outgoing = folder.parent / f".outgoing-{folder.name}"
        if outgoing.exists():
            shutil.rmtree(outgoing)
        folder.rename(outgoing)
        staging.rename(folder)
        shutil.rmtree(outgoing)
    else:
        staging.rename(folder)
    flush_to_disk(folder.parent)


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """Yield the staging folder to write into; the checkpoint appears at `folder` only if the block succeeds."""
    staging = open_staging(folder)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    publish_staging(folder)


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint: 120 of `checkpoint-120`."""
    return int(folder.name.rsplit("-", 1)[1])


def list_checkpoints(parent: Path, prefix: str = "checkpoint") -> list[Path]:
    """Return the folders `prefix-N` of `parent`, newest first, verified or not."""
    if not parent.is_dir():
        return []
    found = [p for p in parent.glob(f"{prefix}-*") if p.is_dir() and p.name[len(prefix) + 1 :].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def newest_verified(parent: Path, prefix: str = "checkpoint") -> tuple[Path | None, list[Damaged]]:
    """Return the newest checkpoint of `parent` that equals its manifest, and the newer ones that are damaged."""
    passed_over = []
    for folder in list_checkpoints(parent, prefix):
        reason = damage(folder)
        if reason is None:
            return folder, passed_over
        passed_over.append(Damaged(folder, reason))
    return None, passed_over


def clear_unfinished(parent: Path) -> None:
    """Remove the unfinished folders of killed processes; none of them was ever visible as a checkpoint."""
    for pattern in (".writing-*", ".outgoing-*"):
        for leftover in parent.glob(pattern):
            shutil.rmtree(leftover)


def remove(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a part of one is never visible."""
    outgoing = folder.parent / f".outgoing-{folder.name}"
    if outgoing.exists():
        shutil.rmtree(outgoing)
    folder.rename(outgoing)
    shutil.rmtree(outgoing)


def prune(parent: Path, keep: int, prefix: str = "checkpoint") -> None:
    """Remove all but the newest `keep` checkpoints."""
    for folder in list_checkpoints(parent, prefix)[keep:]:
        remove(folder)
