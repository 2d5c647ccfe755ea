"""Image-text matching (ITM) of BLIP-2 (arXiv:2301.12597), and the hard negatives that it is trained with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blipren.training.objectives.contrast import at_least_fp32
from blipren.training.objectives.gathering import global_count, world


def hard_negatives(logits: Tensor, pairs: Tensor, seed: int, offset: int = 0) -> Tensor:
    """For each row one column that is not a true pair, drawn with the softmax of the logits as probabilities.

    The noise depends on the seed and on the row's place among the rows of all processes: the same rows give the same
    draws however they are shared out.

    Args:
        logits: `[n, N]`, scaled similarities.
        pairs: `[n, N]`, the true pairs.
        seed: of this draw; another one for the other direction and for every step.
        offset: first of these rows among all.

    Returns:
        `[n]` column indices; -1 where every column is a true pair.
    """
    total = logits.shape[1]
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(total, total, generator=generator, dtype=torch.float64)[offset : offset + len(logits)]
    gumbel = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float64).tiny)))
    scores = (logits.detach().double().cpu() + gumbel).masked_fill(pairs.cpu(), float("-inf"))
    drawn = scores.argmax(-1)
    drawn[pairs.all(-1).cpu()] = -1
    return drawn.to(logits.device)


def itm(logits: Tensor, labels: Tensor, count: float | None = None) -> Tensor:
    """Image-text matching: cross-entropy of `[pairs, 2]` logits, column 1 meaning "they belong together".

    Args:
        logits: `[pairs, 2]`, the mean of the queries' logits.
        labels: `[pairs]`, 1 for true pairs and 0 for the drawn negatives.
        count: pairs of all processes (and chunks); counted here when not given.
    """
    count = global_count(len(labels), labels.device) if count is None else count
    return F.cross_entropy(at_least_fp32(logits), labels, reduction="sum") / count * world()[1]
