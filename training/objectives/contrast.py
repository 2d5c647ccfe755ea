"""Image-text contrast (ITC): softmax over the batch, or a sigmoid for every pair.

The softmax form is BLIP-2's (Li et al. 2023, arXiv:2301.12597), the sigmoid form SigLIP's (Zhai et al. 2023,
arXiv:2303.15343). How losses are divided over processes: `gathering.py`.

Symbols: n rows here, N rows in all processes, Q queries, D embedding width. A row is one image with one caption.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from blipren.training.objectives.gathering import gather, row_offset, world


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
