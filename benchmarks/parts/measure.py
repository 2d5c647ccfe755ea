"""What benchmarks measure of a step besides its time: memory, matrix rate, time by operator."""

import ctypes
import json
import platform
import time
from pathlib import Path

import torch


def print_report(report: dict, out: Path | None) -> None:
    """Print a report as JSON, and write it into a file if one is named."""
    text = json.dumps(report, indent=1)
    if out is not None:
        out.write_text(text + "\n")
    print(text)


def resident(key: str) -> int:
    """Return `VmRSS` or `VmHWM` of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


class PeakMemory:
    """Peak memory of a block beyond what was used before it, in `.bytes`; None where it cannot be measured."""

    bytes: int | None = None

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def __enter__(self):
        if self.cuda:
            torch.cuda.synchronize()
            self.before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        elif platform.system() == "Linux":
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.before = resident("VmRSS")
        return self

    def __exit__(self, *error):
        if self.cuda:
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        elif platform.system() == "Linux":
            self.bytes = resident("VmHWM") - self.before


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return FLOP/s of one large matrix product, the most that this machine reaches at the moment."""
    a = torch.randn(2048, 2048, device=device).to(dtype)
    best = 0.0
    for _ in range(4):
        began = time.perf_counter()
        (a @ a).sum().item()
        best = max(best, 2 * 2048**3 / (time.perf_counter() - began))
    return best


def operator_shares(step, device: torch.device) -> dict[str, float]:
    """Return the share of the time of `step()` that each operator takes itself; shares below .01 are summed as `other`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, own) for event in profiler.key_averages()}
    total = sum(times.values())
    shares = {key: spent / total for key, spent in sorted(times.items(), key=lambda item: -item[1])}
    large = {key: round(share, 3) for key, share in shares.items() if share >= 0.01}
    return large | {"other": round(1 - sum(large.values()), 3)}
