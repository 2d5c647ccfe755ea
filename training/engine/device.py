"""Choice of the device and the precision that a command computes in."""

import torch

from blipren.training.errors import UserError


def choose_device(name: str = "auto") -> str:
    """Return the name of a device as torch takes it; `auto` is CUDA, else MPS, else the CPU.

    Raises:
        UserError: the named device is not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, is_available in available.items() if is_available)
    if not available.get(name.partition(":")[0]):
        raise UserError(f"device {name} is not available; give --device auto or cpu")
    return name


def choose_precision(name: str, device: str) -> str:
    """Return fp32, bf16 or fp16; `auto` is bf16 where the GPU has it, else fp32.

    Raises:
        UserError: the device has no such arithmetic.
    """
    if name == "auto":
        return "bf16" if device == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if name == "fp16" and device != "cuda":
        raise UserError(f"precision fp16 needs a CUDA GPU, not {device}; give --precision bf16 or fp32")
    return name
