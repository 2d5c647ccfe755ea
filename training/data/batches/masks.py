"""Who may look at whom in a batch of rows (data/batches.py says what a row is)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

FLEX = "flex_attention"


@contextmanager
def dense_attention(language_model) -> Iterator[None]:
    """SDPA in place of FlexAttention inside the block: for generation, which looks at one position at a time, and for
    counting arithmetic, which torch cannot do for FlexAttention."""
    flex = language_model.config._attn_implementation == FLEX
    if flex:
        language_model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if flex:
            language_model.set_attn_implementation(FLEX)


def who_sees_whom(block_ids: torch.Tensor, segment_ids: torch.Tensor, unseen: torch.Tensor | None = None) -> Callable:
    """[rows, length] ids -> a function of (row, head, i, j): may position i look at j?

    That is: j is not behind i, both are of one block, and j is of the prefix (segment 0) or of i's own segment. Nobody
    looks at what is `unseen` [rows, length]; it sees itself.
    """

    def sees(row, head, i, j):
        of_prefix_or_own = (segment_ids[row, j] == 0) | (segment_ids[row, i] == segment_ids[row, j])
        seen = (j <= i) & (block_ids[row, i] == block_ids[row, j]) & of_prefix_or_own
        return seen if unseen is None else seen & (~unseen[row, j] | (i == j))

    return sees


def shared_prefix_mask(
    block_ids: torch.Tensor, segment_ids: torch.Tensor, dtype: torch.dtype, unseen: torch.Tensor | None = None
) -> torch.Tensor:
    """Additive mask [rows, 1, length, length]: 0 where `who_sees_whom` allows it."""
    (rows, length), device = block_ids.shape, block_ids.device
    row, place = torch.arange(rows, device=device), torch.arange(length, device=device)
    allowed = who_sees_whom(block_ids, segment_ids, unseen)(row[:, None, None], 0, place[:, None], place)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def shared_prefix_block_mask(
    block_ids: torch.Tensor, segment_ids: torch.Tensor, unseen: torch.Tensor | None = None
) -> BlockMask:
    """The same for FlexAttention (https://arxiv.org/abs/2412.05496), which passes over pieces of 128 x 128 positions
    that nobody looks at."""
    rows, length = block_ids.shape
    sees = who_sees_whom(block_ids, segment_ids, unseen)
    return create_block_mask(sees, rows, None, length, length, device=block_ids.device)


def row_mask(batch: dict, language_model, unseen: torch.Tensor | None = None) -> torch.Tensor | BlockMask:
    """The attention mask of a batch, in the form that the language model's attention takes: 2-D for padded rows."""
    if "attention_mask" in batch:
        return batch["attention_mask"] if unseen is None else batch["attention_mask"].masked_fill(unseen, 0)
    if language_model.config._attn_implementation == FLEX:
        return shared_prefix_block_mask(batch["block_ids"], batch["segment_ids"], unseen)
    dtype = language_model.get_input_embeddings().weight.dtype
    return shared_prefix_mask(batch["block_ids"], batch["segment_ids"], dtype, unseen)
