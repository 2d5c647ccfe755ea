"""Programs in processes of their own that start at once.

Importing torch, transformers, peft and TRL takes each new process ten seconds of a core. A server process imports them
once and forks for every program: it has memory of its own, and can be killed. multiprocessing's fork server is not used:
it has one environment for a whole session, and libraries read theirs when they are imported.
"""

import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

COMMAND = "blipren.training.cli"
IMPORTED = ("torch.distributed", "torch.utils.data", "blipren.training.stages.train", "blipren.training.evaluation")


class Program:
    """A running program, of one or several processes; the subset of `subprocess.Popen` that tests need."""

    def __init__(self, server: "ProcessServer", pids: list[int], output: Path) -> None:
        self.server, self.pids, self.output = server, pids, output
        self.statuses: dict[int, int] = {}

    @property
    def returncode(self) -> int | None:
        """Exit status of the first process that failed, else 0; minus the signal that ended it."""
        if len(self.statuses) < len(self.pids):
            return None
        return next((status for status in self.statuses.values() if status), 0)

    def poll(self) -> int | None:
        for pid in self.pids:
            if pid not in self.statuses:
                status = self.server.ask(wait=pid)
                if status is not None:
                    self.statuses[pid] = status
                    if status:  # the others would wait for it for ever
                        self.send_signal(signal.SIGKILL)
        return self.returncode

    def send_signal(self, number: int) -> None:
        for pid in self.pids:
            if pid not in self.statuses:
                os.kill(pid, number)

    def communicate(self, timeout: float = 300) -> tuple[str, None]:
        """Wait for the end. Returns what the processes wrote, standard output and errors together, and None."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired(str(self.pids), timeout, self.output.read_text())
            time.sleep(0.02)
        return self.output.read_text(errors="replace"), None


class ProcessServer:
    """A process that has imported the libraries, and forks for every program."""

    def __init__(self, environment: dict[str, str]) -> None:
        environment = environment | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, **pipes
        )  # ends when its input does

    def ask(self, **order):
        print(json.dumps(order), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, "the process that forks for the tests has ended"
        return json.loads(answer)

    def start(
        self, arguments: list[str], output: Path, program: str = COMMAND, processes: int = 1, cwd: Path | None = None
    ) -> Program:
        """Start a module, or a script by its path ending in .py, in one process or in several as torchrun would.

        `output` is the file of what they write.
        """
        output.write_text("")
        order = {"program": program, "arguments": arguments, "output": str(output), "cwd": str(cwd or Path.cwd())}
        pids = [self.ask(**order, ranks=ranks) for ranks in rank_variables(processes)]
        return Program(self, pids, output)


@functools.cache
def process_server() -> ProcessServer:
    """The server of this test process, with its environment."""
    return ProcessServer(dict(os.environ))


def rank_variables(processes: int) -> list[dict[str, str]]:
    """The environment variables of torchrun for each process; none for a single one."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    return [{name: str(value) for name, value in rank.items()} for rank in ranks]


def run(order: dict) -> None:
    """Become the program, in a process that was forked for it."""
    written = os.open(order["output"], os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(written, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(order["cwd"])
    os.environ.update(order["ranks"])
    sys.argv = [order["program"], *order["arguments"]]
    if order["program"].endswith(".py"):
        sys.path.insert(0, str(Path(order["program"]).parent))
        runpy.run_path(order["program"], run_name="__main__")
    else:
        runpy.run_module(order["program"], run_name="__main__", alter_sys=True)


def serve() -> None:
    """Answer each line of standard input: start a program (its process id), or tell how one ended (null: it has not)."""
    for name in IMPORTED:
        __import__(name)
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    threads = [name for name in threads if name != "jemalloc_bg_thd"]  # pyarrow's allocator, which expects forks
    assert len(threads) == 1, f"a process with threads must not fork: {threads}"
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            pid, status = os.waitpid(order["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                return run(order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
