"""Files and folders that are complete or absent, whenever the process is killed."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from blipren.training.errors import UserError


def flush_to_disk(path: Path) -> None:
    """Flush a file, or a folder's list of names, so that a later rename cannot reach the disk before it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def report_full_disk(folder: Path) -> Iterator[None]:
    """Raise `UserError` for an `OSError` that means that no more can be written to `folder`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"no space left for {folder} ({error.strerror}): free some and run the same command again"
        ) from error


def write_atomically(path: Path, content: str | bytes, flush: bool = True) -> None:
    """Write a file that holds the old content or the new one, never a part. Text is written as UTF-8.

    Args:
        flush: wait for the disk. A killed process loses nothing without it; a power cut may.

    Raises:
        UserError: the disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with report_full_disk(path.parent):
        try:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            if flush:
                flush_to_disk(temporary)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def check_new_folder(out: Path) -> None:
    """Raise `UserError` unless `out` is absent or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; choose another OUT or remove it")


@contextlib.contextmanager
def complete_or_absent_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write into. It gets the name `out` when the block succeeds and is removed when it fails.

    Raises:
        UserError: `out` exists and is not an empty folder.
    """
    check_new_folder(out)
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
