"""Arithmetic of a training step, counted by torch on the step itself, and what a device could do."""

import torch
from torch.utils.flop_counter import FlopCounterMode

# Dense half-precision matrix multiplication without sparsity, FLOP/s, from the makers' data sheets.
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
    """Peak FLOP/s of a device at half precision, or None where it is not known (CPUs, fp32)."""
    if device.type != "cuda" or not half:
        return None
    name = torch.cuda.get_device_name(device)
    return next((value for key, value in HALF_PEAKS.items() if key in name), None)


def count(step) -> int:
    """FLOPs of the matrix multiplications and attentions that `step()` runs, backward included.

    Frozen weights count as what they need: their products forward and for the gradient that passes through them, not
    for gradients of their own.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()
