"""Gradient caching (Gao et al. 2021, arXiv:2101.06983): a contrast over more rows than one graph may hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class GradientCache:
    """Contrast over more rows than one graph may hold, with the gradient of the plain computation.

    `embeddings` are computed chunk by chunk without graphs; a loss over all of them gives each embedding its
    gradient; every chunk is then encoded again, with the same random numbers, and `surrogate` is the scalar whose
    gradient is that chunk's share. Only one chunk's graph lives at a time.

    Args:
        encode: chunk -> tuple of tensors with rows in dimension 0.
        chunks: the pieces of the batch.
    """

    def __init__(self, encode: Callable[..., tuple[Tensor, ...]], chunks: Sequence):
        self.encode, self.chunks = encode, chunks
        self._random, encoded = [], []
        with torch.no_grad():
            for chunk in chunks:
                self._random.append(_random_state())
                encoded.append(encode(chunk))
        self._rows = [len(tensors[0]) for tensors in encoded]
        self.embeddings = tuple(torch.cat(parts).requires_grad_() for parts in zip(*encoded, strict=True))

    def surrogate(self, index: int) -> Tensor:
        """The scalar that stands for chunk `index` after the loss over `embeddings` was differentiated."""
        if any(embedding.grad is None for embedding in self.embeddings):
            raise ValueError("An embedding has no gradient: call backward on a loss over all of them first.")
        _set_random_state(self._random[index])
        start = sum(self._rows[:index])
        rows = slice(start, start + self._rows[index])
        encoded = self.encode(self.chunks[index])
        return sum(
            (tensor * whole.grad[rows].to(tensor.dtype)).sum()
            for tensor, whole in zip(encoded, self.embeddings, strict=True)
        )


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
