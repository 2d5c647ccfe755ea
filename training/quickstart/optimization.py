"""Optimizer, step and saving, shared by the training of both towers."""

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


def make_optimizer(parameters, learning_rate: float, steps: int):
    """Return AdamW and its schedule: 100 steps of warmup, then a cosine down to a hundredth."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98))

    def scale(step: int) -> float:
        return min(1.0, (step + 1) / 100) * (0.505 + 0.495 * np.cos(np.pi * step / steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, scale)


def take_step(loss: Tensor, model: nn.Module, optimizer, schedule) -> None:
    """Take one optimizer step with the gradient clipped to length 1."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)


def save_half_precision(model, out: Path) -> None:
    """Write the model in float16, with the dtype in `config.json`."""
    out.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).half().save_pretrained(out)
    size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    print(f"{out}: {size / 1e6:.2f} MB of weights")
