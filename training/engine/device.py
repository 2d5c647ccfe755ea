"""Choice of the device that a command computes on."""

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
