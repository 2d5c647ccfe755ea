"""Arithmetic of a training step, counted by torch while it runs, and the peak arithmetic of devices."""

import torch
from torch.utils.flop_counter import FlopCounterMode

# FLOP/s of dense half-precision matrix multiplication, without sparsity, from the data sheets.
HALF_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


def peak(device: torch.device, half: bool) -> float | None:
    """Return the peak FLOP/s of a device at half precision, or None where it is not known (CPUs, fp32)."""
    if device.type != "cuda" or not half:
        return None
    name = torch.cuda.get_device_name(device)
    return next((value for key, value in HALF_PEAKS.items() if key in name), None)


def count(step) -> int:
    """Return the FLOPs of the matrix multiplications and attentions that `step()` runs, backward included.

    A frozen weight counts twice, for the forward pass and for the gradient of its input; a trained one three times.
    """
    # uncompiled: torch compiles nothing that it met first inside of a counter, now or later
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()
