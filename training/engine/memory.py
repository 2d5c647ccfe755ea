"""Memory that the process keeps between batches."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of large tensors, and not give it back to the kernel after every layer.

    By default it maps each block over 32 MiB anew, and the kernel clears its pages at first touch: a MobileNetV2 on 32
    images spends more time there than in its arithmetic (`benchmarks/embed.py`). Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(parameter, 2**31 - 1)
