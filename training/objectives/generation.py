"""Image-grounded text generation (ITG) of BLIP-2 (arXiv:2301.12597)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from blipren.training.objectives.contrast import at_least_fp32
from blipren.training.objectives.gathering import global_count, world


def itg(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, count: float | None = None) -> Tensor:
    """Image-grounded text generation: each token from the image and the tokens before it.

    Args:
        logits: `[n, T, V]`, or `[tokens, V]`, where position t already belongs to label t (no shift is done here).
        labels: `[n, T]` or `[tokens]`; -100 is left out.
        label_smoothing: share of the target that is spread over the vocabulary (BLIP-2: 0.1).
        count: label tokens of all processes (and chunks); counted here when not given.
    """
    labels = labels.reshape(-1)
    count = global_count((labels != -100).sum(), labels.device) if count is None else count
    loss = F.cross_entropy(
        at_least_fp32(logits.reshape(len(labels), -1)),
        labels,
        ignore_index=-100,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return loss / max(count, 1) * world()[1]
