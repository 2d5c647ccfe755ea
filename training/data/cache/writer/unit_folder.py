"""A folder that is written unit by unit, so that the process may be killed at any moment.

A unit is a number of rows in reading order. Its files are renamed into place, then a JSON file marks it as done. A unit
without a mark is made again from its first row, so that a second run writes the same bytes. Files are flushed to the disk
in the background while the next unit is made; after a power cut, the newest units are therefore checked against their
checksums.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from blipren.training.data.cache.fingerprints import check_same_fingerprint
from blipren.training.data.cache.shards import as_json, file_checksum
from blipren.training.errors import UserError
from blipren.training.files import flush_to_disk, write_atomically


class UnitFolder(abc.ABC):
    """A folder that is being written.

    Args:
        folder: where to.
        fingerprint: what decides its content; a folder that was begun with another one is refused.
        rows_per_unit: rows in reading order of a unit.
    """

    kind: str
    """What the folder is, in messages."""
    marks: str
    """Name of the folder with the marks."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any], rows_per_unit: int):
        self.folder, self.fingerprint, self.rows_per_unit = folder, fingerprint, rows_per_unit
        self._finisher = ThreadPoolExecutor(1)
        self._finishing: Future[None] | None = None

    @abc.abstractmethod
    def unit_files(self, record: dict[str, Any]) -> list[Path]:
        """Return the files of a unit, in the order of `file_records`."""

    @abc.abstractmethod
    def file_records(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the records of the files of a unit, each with its `xxh3_128`."""

    def companions(self, path: Path) -> list[Path]:
        """Return the files that belong to a file of a unit."""
        return []

    def start(self) -> None:
        """Begin in an empty folder, or continue in one with the same fingerprint and remove its unfinished files."""
        begun = self.folder / self.marks / "fingerprint.json"
        others = [path.name for path in self.folder.iterdir() if path.name not in (".lock", self.marks)]
        if begun.exists():
            check_same_fingerprint(json.loads(begun.read_text()), self.fingerprint, self.folder)
        elif others:
            raise UserError(f"{self.folder} is not empty and is not a {self.kind} (it holds {sorted(others)[0]})")
        else:
            begun.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(begun, as_json(self.fingerprint))
        for path in self.folder.rglob("*.tmp"):
            path.unlink()
        self._check_newest()

    def unit_path(self, number: int) -> Path:
        return self.folder / self.marks / f"{number:05d}.json"

    def is_done(self, number: int) -> bool:
        return self.unit_path(number).exists()

    def done_units(self) -> list[int]:
        return sorted(int(path.stem) for path in (self.folder / self.marks).glob("[0-9]*.json"))

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records of the finished units."""
        for number in self.done_units():
            yield json.loads(self.unit_path(number).read_text())

    def finish(self, unit: Any) -> None:
        """Finish a unit, whose `finish` returns its files. They are flushed to the disk in the background."""
        self.wait()
        files = unit.finish()
        self._finishing = self._finisher.submit(self._flush_to_disk, files)

    def _flush_to_disk(self, files: list[Path]) -> None:
        """Flush the files of a unit. If that fails, the unit is unmarked and removed."""
        try:
            for path in files:
                for file in (path, *self.companions(path)):
                    flush_to_disk(file)
            for folder in {path.parent for path in files}:
                flush_to_disk(folder)
        except OSError:  # the disk could not take what it had accepted
            for path in reversed(files):  # the mark first
                for file in (path, *self.companions(path)):
                    file.unlink(missing_ok=True)
            raise

    def wait(self) -> None:
        """Wait for the flush in the background. Raises what it raised."""
        if self._finishing is not None:
            pending, self._finishing = self._finishing, None
            pending.result()

    def _check_newest(self) -> None:
        """Unmark units that a power cut left damaged; only the newest two can be."""
        for number in sorted(self.done_units(), key=lambda n: self.unit_path(n).stat().st_mtime_ns)[-2:]:
            try:
                record = json.loads(self.unit_path(number).read_text())
                intact = all(
                    file_checksum(path) == known["xxh3_128"] and all(file.exists() for file in self.companions(path))
                    for path, known in zip(self.unit_files(record), self.file_records(record))
                )
            except (ValueError, KeyError, FileNotFoundError):
                intact = False
            if not intact:
                print(f"unit {number} was not completely on the disk: it is made again")
                self.unit_path(number).unlink()

    def close(self) -> None:
        """Wait for the background thread to end."""
        self._finisher.shutdown(wait=True)
