"""Attention masks of batches whose rows hold several blocks (collate.py says what a row is)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

FLEX = "flex_attention"


@contextmanager
def dense_attention(language_model) -> Iterator[None]:
    """Use SDPA in place of FlexAttention inside the block.

    For generation, which computes one position at a time, and for counting FLOPs, which torch cannot do for
    FlexAttention.
    """
    flex = language_model.config._attn_implementation == FLEX
    if flex:
        language_model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if flex:
            language_model.set_attn_implementation(FLEX)


def build_attention_rule(
    block_ids: torch.Tensor, segment_ids: torch.Tensor, hidden: torch.Tensor | None = None
) -> Callable:
    """Build the function of (row, head, i, j) that says whether position i attends to position j.

    It does where j is not behind i, both are in one block, and j is in the prefix (segment 0) or in i's own segment.

    Args:
        block_ids, segment_ids: `[rows, length]`.
        hidden: `[rows, length]`, positions that only they themselves attend to.
    """

    def attends(row, head, i, j):
        prefix_or_own_segment = (segment_ids[row, j] == 0) | (segment_ids[row, i] == segment_ids[row, j])
        allowed = (j <= i) & (block_ids[row, i] == block_ids[row, j]) & prefix_or_own_segment
        return allowed if hidden is None else allowed & (~hidden[row, j] | (i == j))

    return attends


def shared_prefix_mask(
    block_ids: torch.Tensor, segment_ids: torch.Tensor, dtype: torch.dtype, hidden: torch.Tensor | None = None
) -> torch.Tensor:
    """Build the additive mask `[rows, 1, length, length]`: 0 where `build_attention_rule` allows attention."""
    (rows, length), device = block_ids.shape, block_ids.device
    row, place = torch.arange(rows, device=device), torch.arange(length, device=device)
    allowed = build_attention_rule(block_ids, segment_ids, hidden)(row[:, None, None], 0, place[:, None], place)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def shared_prefix_block_mask(
    block_ids: torch.Tensor, segment_ids: torch.Tensor, hidden: torch.Tensor | None = None
) -> BlockMask:
    """Build the same mask for FlexAttention (arXiv 2412.05496), which skips tiles of 128 x 128 that are all masked."""
    rows, length = block_ids.shape
    rule = build_attention_rule(block_ids, segment_ids, hidden)
    return create_block_mask(rule, rows, None, length, length, device=block_ids.device)


def build_attention_mask(batch: dict, language_model, hidden: torch.Tensor | None = None) -> torch.Tensor | BlockMask:
    """Build the attention mask of a batch in the form that the language model's attention takes.

    Padded rows have a 2-D mask, shared prefixes an additive mask or FlexAttention's block mask.
    """
    if "attention_mask" in batch:
        return batch["attention_mask"] if hidden is None else batch["attention_mask"].masked_fill(hidden, 0)
    if language_model.config._attn_implementation == FLEX:
        return shared_prefix_block_mask(batch["block_ids"], batch["segment_ids"], hidden)
    dtype = language_model.get_input_embeddings().weight.dtype
    return shared_prefix_mask(batch["block_ids"], batch["segment_ids"], dtype, hidden)
