"""Faults that a test asks the loopback Hub for, and the log of what was requested."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass

KINDS = ("drop", "lost", "status", "truncate", "stop")


@dataclass
class Fault:
    """One fault, which the next `times` requests get whose method and path match.

    drop      the connection is closed before anything is done (in an upload: in the middle of the body)
    lost      the request is carried out, but its answer never arrives
    status    an error status is answered, nothing is done
    truncate  the body of the answer breaks off after `after_bytes`
    stop      from this request on the server answers nothing at all, until `Faults.clear()`
    """

    kind: str
    method: str
    path: str
    times: int = 1
    status: int = 500
    after_bytes: int = 0
    taken: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of fault {self.kind!r}: one of {', '.join(KINDS)}")


class Faults:
    """Thread-safe list of faults; each request takes the first that matches."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self.stopped = False

    def add(self, kind: str, method: str, path: str, **options) -> Fault:
        fault = Fault(kind, method, path, **options)
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()
            self.stopped = False

    def take(self, method: str, path: str) -> Fault | None:
        with self._lock:
            if self.stopped:
                return Fault("drop", method, path)
            for fault in self._faults:
                if fault.taken < fault.times and fault.method == method and re.search(fault.path, path):
                    fault.taken += 1
                    if fault.kind == "stop":
                        self.stopped = True
                        return Fault("drop", method, path)
                    return fault
        return None
