"""The three losses of Q-Former pretraining, as pure functions, and the two tools that large batches need.

ITC (image-text contrast), ITM (image-text matching) and ITG (image-grounded text generation) are those of BLIP-2
(Li et al. 2023, arXiv:2301.12597); the sigmoid form of ITC is SigLIP's (Zhai et al. 2023, arXiv:2303.15343); gradient
caching is Gao et al. 2021 (arXiv:2101.06983).

One rule holds for all of them. A loss is summed over the rows of this process, divided by the number of rows of *all*
processes, and multiplied by the number of processes. Its mean over processes (what DistributedDataParallel makes of
gradients) is then the loss of the joined batch, whatever the shares are. In a single process the rule is the plain mean.

Symbols: n rows here, N rows in all processes, Q queries, D embedding width. A row is one image with one caption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


# ------------------------------------------------------------------------------------------------- several processes
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


# ------------------------------------------------------------------------------------------------------------- ITC
def at_least_fp32(tensor: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def similarity(image_embeds: Tensor, text_embeds: Tensor, pooling: str = "max") -> Tensor:
    """Cosine similarity of every image with every text, `[images, texts]`.

    Args:
        image_embeds: `[images, Q, D]`, each query's vector of length one.
        text_embeds: `[texts, D]`, of length one.
        pooling: "max", the best query counts (BLIP-2); "mean", the queries' mean, brought back to length one.
    """
    image_embeds, text_embeds = at_least_fp32(image_embeds), at_least_fp32(text_embeds)
    if pooling == "mean":
        return F.normalize(image_embeds.mean(1), dim=-1) @ text_embeds.T
    if pooling != "max":
        raise ValueError(f"pooling is {pooling!r}: give 'max' or 'mean'.")
    images, queries, width = image_embeds.shape
    per_query = image_embeds.reshape(images * queries, width) @ text_embeds.T
    return per_query.view(images, queries, -1).amax(1)


def true_pairs(image_ids: Tensor, text_ids: Tensor, all_image_ids: Tensor, all_text_ids: Tensor) -> Tensor:
    """`[n, N]`, true where row i and row j show the same image or say the same caption.

    Such a pair of image i and text j is right, though it is not the pair of one row: it must never be a negative.
    """
    return (image_ids[:, None] == all_image_ids[None]) | (text_ids[:, None] == all_text_ids[None])


def _contrast(logits: Tensor, target: Tensor, left_out: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of each row over the columns that are not left out, `[n]`."""
    log_probs = logits.masked_fill(left_out, float("-inf")).log_softmax(-1)
    loss = -log_probs.gather(1, target[:, None])[:, 0]
    if label_smoothing:
        kept = ~left_out
        spread = -log_probs.masked_fill(left_out, 0).sum(-1) / kept.sum(-1)
        loss = (1 - label_smoothing) * loss + label_smoothing * spread
    return loss


@dataclass
class ItcOutput:
    """What contrast found out.

    loss: scalar. image_to_text, text_to_image: this process's rows against the texts, or images, of all, `[n, N]`,
    scaled, without gradient. pairs: `[n, N]`, `true_pairs` of the same rows. accuracy: share of the rows, both ways,
    whose own partner is the best among those that are not also true. offset: first row of this process among all.
    """

    loss: Tensor
    image_to_text: Tensor
    text_to_image: Tensor
    pairs: Tensor
    accuracy: Tensor
    offset: int


def itc(
    image_embeds: Tensor,
    text_embeds: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    scale: Tensor | float,
    bias: Tensor | float = 0.0,
    *,
    kind: str = "softmax",
    pooling: str = "max",
    label_smoothing: float = 0.0,
) -> ItcOutput:
    """Image-text contrast of this process's rows against those of all processes, in float32 or better.

    Args:
        image_embeds: `[n, Q, D]`, length one per query.
        text_embeds: `[n, D]`, length one.
        image_ids, text_ids: `[n]` integers that name the image and the caption's text. Another row with the same
            image or the same text is left out: neither a positive nor a negative.
        scale: factor of the cosine, 1 / temperature.
        bias: added to the logits; only the sigmoid form feels it.
        kind: "softmax" (BLIP-2: the mean of both directions) or "sigmoid" (SigLIP: every pair is a yes-no question,
            summed, divided by the rows).
        pooling: how queries are put together, see `similarity`.
        label_smoothing: of the softmax form (LAVIS trains BLIP-2 with 0.1).
    """
    all_images, all_texts = gather(image_embeds), gather(text_embeds)
    all_image_ids, all_text_ids = gather(image_ids), gather(text_ids)
    pairs = true_pairs(image_ids, text_ids, all_image_ids, all_text_ids)
    image_to_text = similarity(image_embeds, all_texts, pooling) * scale + bias
    text_to_image = similarity(all_images, text_embeds, pooling).T * scale + bias

    offset = row_offset(len(image_ids), image_ids.device)
    own = torch.arange(len(image_ids), device=image_ids.device) + offset
    left_out = pairs.clone()
    left_out[torch.arange(len(own)), own] = False

    if kind == "softmax":
        rows = _contrast(image_to_text, own, left_out, label_smoothing)
        rows = (rows + _contrast(text_to_image, own, left_out, label_smoothing)) / 2
    elif kind == "sigmoid":
        sign = -torch.ones_like(image_to_text)
        sign[torch.arange(len(own)), own] = 1.0
        rows = -F.logsigmoid(sign * image_to_text).masked_fill(left_out, 0.0).sum(-1)
    else:
        raise ValueError(f"kind is {kind!r}: give 'softmax' or 'sigmoid'.")
    loss = rows.sum() / len(all_image_ids) * world()[1]

    with torch.no_grad():
        best = [logits.masked_fill(left_out, float("-inf")).argmax(-1) for logits in (image_to_text, text_to_image)]
        accuracy = torch.stack([(b == own).float().mean() for b in best]).mean()
    return ItcOutput(loss, image_to_text.detach(), text_to_image.detach(), pairs, accuracy, offset)


# ------------------------------------------------------------------------------------------------------------- ITM
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


# ------------------------------------------------------------------------------------------------------------- ITG
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


# ------------------------------------------------------------------------------------------------ gradient caching
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
