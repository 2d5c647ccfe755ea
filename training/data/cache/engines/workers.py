"""Worker processes that prepare batches ahead of the encoder.

They write pixels into memory that they share with the main process.
"""

from __future__ import annotations

import collections
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import torch

from blipren.training.data.cache.prepare import prepare_batch
from blipren.training.data.sources.rows import Row
from blipren.training.errors import UserError

_shared: dict[str, Any] = {}


def _exit_with_parent(parent: int) -> None:
    """End this process when its parent was killed: it would keep memory and the cache's lock."""
    while os.getppid() == parent:
        time.sleep(0.25)
    os._exit(1)


def _start_worker(config: Any, prepare: Callable, slots: list[mmap.mmap] | None, parent: int) -> None:
    torch.set_num_threads(1)  # one process a core, and no thread pool after a fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    _shared.update(config=config, prepare=prepare, slots=slots)


def _prepare_in_worker(rows: list[Row], slot: int | None) -> Any:
    batch = _shared["prepare"](rows, _shared["config"])
    slots = _shared["slots"]
    size = sum(tensor.nbytes for tensor in batch.pixels.values())
    if slots is None or slot is None or size > len(slots[slot]):
        batch.pixels = {name: tensor.numpy() for name, tensor in batch.pixels.items()}
        return batch
    offset = 0
    for name, tensor in batch.pixels.items():
        array = tensor.contiguous().numpy()
        target = np.frombuffer(slots[slot], array.dtype, array.size, offset).reshape(array.shape)
        target[...] = array
        batch.pixels[name] = (slot, offset, str(array.dtype), array.shape)
        offset += -(-array.nbytes // 64) * 64
    return batch


class Workers:
    """Pool of processes that prepare batches in order, a few at a time.

    Args:
        config: settings of the preparation.
        workers: number of processes; 0 prepares in this one.
        slot_bytes: size of a full batch's pixels, which a worker passes through shared memory.
        prepare: rows and settings -> a batch with `pixels`.
    """

    def __init__(
        self,
        config: Any,
        workers: int,
        slot_bytes: int,
        prepare: Callable[[list[Row], Any], Any] = prepare_batch,
    ):
        self.config, self.workers, self.prepare = config, workers, prepare
        self.in_flight = 2 * workers + 1
        self._pool: ProcessPoolExecutor | None = None
        self._slots: list[mmap.mmap] | None = None
        if workers:
            method = "fork" if sys.platform == "linux" else "spawn"
            if method == "fork" and slot_bytes:  # anonymous memory, which the size of /dev/shm does not limit
                self._slots = [mmap.mmap(-1, slot_bytes + 4096) for _ in range(self.in_flight + 1)]
            self._pool = ProcessPoolExecutor(
                workers,
                mp_context=multiprocessing.get_context(method),
                initializer=_start_worker,
                initargs=(config, prepare, self._slots, os.getpid()),
            )

    def map(self, tasks: Iterable[list[Row]]) -> Iterator[Any]:
        """Yield batches in the order of the tasks. The pixels of a batch are valid until the next one is taken."""
        if self._pool is None:
            for rows in tasks:
                yield self.prepare(rows, self.config)
            return
        waiting: collections.deque[Future[Any]] = collections.deque()
        slot, count = 0, len(self._slots or [None])
        try:
            for rows in tasks:
                waiting.append(self._pool.submit(_prepare_in_worker, rows, slot))
                slot = (slot + 1) % count
                if len(waiting) >= self.in_flight:
                    yield self._map_pixels(waiting.popleft().result())
            while waiting:
                yield self._map_pixels(waiting.popleft().result())
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, most often because memory ran out: use fewer --workers or a smaller "
                "--batch-size; the same command continues after the last finished shard"
            ) from error

    def _map_pixels(self, batch: Any) -> Any:
        """Replace the places of pixels in shared memory by tensors over it."""
        pixels = {}
        for name, value in batch.pixels.items():
            if isinstance(value, tuple):
                slot, offset, dtype, shape = value
                count = int(np.prod(shape))
                value = np.frombuffer(self._slots[slot], dtype, count, offset).reshape(shape)
            pixels[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        batch.pixels = pixels
        return batch

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def default_workers() -> int:
    """Return the default number of workers: one less than the cores of this process, from 1 to 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(16, cores - 1))
