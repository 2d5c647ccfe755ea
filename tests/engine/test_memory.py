"""Memory of large tensors is reused, and not asked of the kernel anew."""

import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource
import torch
from transformers import AutoModel, Trainer  # as in a command: what was allocated before decides where blocks lie
from blipren.training.engine.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(16 * 2**20)  # 64 MiB: over every threshold that glibc would choose by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
default = faults()
keep_freed_memory()
faults()
print(default, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_large_tensors_reuse_pages():
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=True)
    default, kept = map(int, done.stdout.split())
    assert default > 100  # huge pages of 2 MiB are 32 a tensor, small ones 16,384
    assert kept < default / 10
