"""A run on Ray whose actor, and then whose driver, is killed before the same run ends."""

import multiprocessing
import time
from collections.abc import Callable

import psutil


def start_ray() -> None:
    """Start Ray as a child of this process, with the actors as eager as the process itself."""
    import ray

    ray.init(
        num_cpus=1,
        log_to_driver=False,
        include_dashboard=False,
        object_store_memory=100 << 20,
        _system_config={"worker_niceness": 0},  # by default 15: beside another busy test an actor would hardly run
    )


def run_with_kills(drive: Callable[[], None], actor: str, marks: Callable[[], int]) -> None:
    """Run `drive` twice, each time in a process of its own. In the first, its actor is killed, then the process.

    Args:
        drive: starts Ray, runs, and ends its process with a status; Ray's processes end with it.
        actor: part of the actor's command line.
        marks: counts the units that are done.
    """
    fork, killed = multiprocessing.get_context("fork"), []

    def wait_for(count: int, child, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while marks() < count and child.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)

    for turn in range(2):
        child = fork.Process(target=drive)
        child.start()
        try:
            if turn == 0:
                wait_for(1, child)
                assert child.is_alive(), f"the driver ended with status {child.exitcode} before it could be killed"
                for process in psutil.Process(child.pid).children(recursive=True):
                    if actor in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
                wait_for(marks() + 1, child)
                child.kill()
            child.join(300)
        finally:
            if child.is_alive():
                child.kill()
    assert killed and child.exitcode == 0
