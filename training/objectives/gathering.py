"""Rows and counts of all processes, for losses that reach over them.

One rule holds for every loss. A loss is summed over the rows of this process, divided by the number of rows of *all*
processes, and multiplied by the number of processes. Its mean over processes (what DistributedDataParallel makes of
gradients) is then the loss of the joined batch, however rows are shared out. In a single process it is the plain mean.

Symbols: n rows here, N rows in all processes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) where nothing is distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def global_count(local: int | Tensor, device: torch.device | None = None) -> float:
    """Sum of a count over all processes."""
    count = torch.as_tensor(local, dtype=torch.float64, device=device)
    if world()[1] > 1:
        count = count.clone()
        dist.all_reduce(count)
    return count.item()


def _row_counts(rows: int, device: torch.device) -> list[int]:
    counts = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world()[1])]
    dist.all_gather(counts, torch.tensor([rows], device=device))
    return [int(count) for count in counts]


def _all_gather_rows(tensor: Tensor, counts: list[int]) -> Tensor:
    """Concatenate the processes' rows; shares may differ in size, so each travels padded to the largest."""
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        return _all_gather_rows(tensor, counts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        # Every process has used every row: a row's gradient is the sum of what all of them found.
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        start = sum(ctx.counts[: world()[0]])
        return gradient[start : start + ctx.counts[world()[0]]], None


def gather(tensor: Tensor) -> Tensor:
    """`[n, ...]` of every process, concatenated to `[N, ...]` in the order of the ranks.

    Gradients flow back to the process that a row came from. Without other processes the tensor itself comes back.
    """
    if world()[1] == 1:
        return tensor
    counts = _row_counts(len(tensor), tensor.device)
    if tensor.requires_grad and torch.is_grad_enabled():
        return _GatherWithGradient.apply(tensor, counts)
    return _all_gather_rows(tensor.contiguous(), counts)


def row_offset(rows: int, device: torch.device) -> int:
    """Where this process's rows begin in a gathered tensor."""
    rank, size = world()
    return sum(_row_counts(rows, device)[:rank]) if size > 1 else 0
