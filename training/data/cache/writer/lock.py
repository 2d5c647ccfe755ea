"""One writer at a time."""

from __future__ import annotations

from pathlib import Path

import filelock

from blipren.training.errors import UserError


class CacheLock:
    """Lock of a cache folder. A second writer prints that it waits. The system frees the lock when its process dies.

    Args:
        wait: seconds to wait for another writer; None waits for ever.
    """

    def __init__(self, folder: Path, wait: float | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.wait = folder, wait
        self._lock = filelock.FileLock(folder / ".lock")

    def __enter__(self) -> CacheLock:
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            print(f"another process is writing {self.folder}; waiting for it", flush=True)
            try:
                self._lock.acquire(timeout=-1 if self.wait is None else self.wait)
            except filelock.Timeout as error:
                raise UserError(f"another process is still writing {self.folder}; try again later") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()
