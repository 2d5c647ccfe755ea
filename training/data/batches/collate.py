"""From blocks to tensors, in one of two layouts.

Shared: blocks are packed into rows of nearly equal length. A mask (masks.py) lets a segment attend to its prefix and to
itself, and positions restart behind the prefix, so that every answer is read as if it were alone.
Padded: one row for each answer, for language models that do not take such a mask.
The end token of an answer is predicted, never read.
"""

import numpy as np
import torch

from blipren.training.data.batches.blocks import Block
from blipren.training.data.batches.packing import pack_rows


def collate_shared(blocks: list[Block], pad_token_id: int, row_tokens: int | None = None, multiple: int = 1) -> dict:
    """Collate blocks into packed rows with shared prefixes.

    The first token of a segment without a prompt is predicted by the last prefix token, which several segments share.
    Targets are therefore pairs and not a tensor of labels.

    Returns:
        `input_ids`, `position_ids`, `block_ids`, `segment_ids`, `is_answer` `[rows, length]`; `predict_from` and
        `targets` `[targets]`: the token `targets[i]` is predicted at the flat position `predict_from[i]`; `segment_of`
        `[targets]`: number of its segment, counted over the blocks as they are given; `images`: the `(cache, image)`
        pairs in the order of their placeholders.
    """
    rows = pack_rows([len(block) for block in blocks], row_tokens)
    length = max(sum(len(blocks[b]) for b in row) for row in rows)
    length = -(-length // multiple) * multiple
    shape = (len(rows), length)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    block_ids = np.full(
        shape, -1, dtype=np.int32
    )  # padding is one block: it attends to itself, so that no row of the mask is empty
    segment_ids = np.zeros(shape, dtype=np.int32)
    is_answer = np.zeros(shape, dtype=bool)
    predict_from, targets, segment_of, images = [], [], [], []
    first_segment = np.cumsum([0, *(len(block.segments) for block in blocks)]).tolist()
    for r, row in enumerate(rows):
        cursor = 0
        for number, b in enumerate(row):
            block, start = blocks[b], cursor
            images.extend(block.images)
            behind_prefix = start + len(block.prefix)
            input_ids[r, start:behind_prefix] = block.prefix
            position_ids[r, start:behind_prefix] = np.arange(len(block.prefix))
            cursor = behind_prefix
            for s, segment in enumerate(block.segments, start=1):
                end = cursor + len(segment)
                input_ids[r, cursor:end] = segment.ids[:-1]
                position_ids[r, cursor:end] = len(block.prefix) + np.arange(end - cursor)
                segment_ids[r, cursor:end] = s
                is_answer[r, cursor:end] = segment.learned[:-1]
                learned = np.flatnonzero(segment.learned)
                # the token before each one: for the first of a segment, the last of the prefix
                predict_from.extend(r * length + np.where(learned > 0, cursor + learned - 1, behind_prefix - 1))
                targets.extend(np.asarray(segment.ids)[learned])
                segment_of.extend([first_segment[b] + s - 1] * len(learned))
                images.extend(segment.images)
                cursor = end
            block_ids[r, start:cursor] = number
    tensors = dict(
        input_ids=input_ids,
        position_ids=position_ids,
        block_ids=block_ids,
        segment_ids=segment_ids,
        is_answer=is_answer,
        predict_from=np.asarray(predict_from, dtype=np.int64),
        targets=np.asarray(targets, dtype=np.int64),
        segment_of=np.asarray(segment_of, dtype=np.int64),
    )
    return {name: torch.from_numpy(array) for name, array in tensors.items()} | {"images": images}


def collate_padded(blocks: list[Block], pad_token_id: int, multiple: int = 1) -> dict:
    """Collate each answer into a right-padded row of its own; image and prompt are repeated.

    Returns:
        `input_ids`, `attention_mask`, `position_ids` `[rows, length]`, and `is_answer`, `predict_from`, `targets`,
        `segment_of`, `images` as from `collate_shared`.
    """
    rows = [(block, segment) for block in blocks for segment in block.segments]
    length = max(len(block.prefix) + len(segment) for block, segment in rows)
    length = -(-length // multiple) * multiple
    input_ids = np.full((len(rows), length), pad_token_id, dtype=np.int64)
    attention_mask = np.zeros((len(rows), length), dtype=np.int64)
    is_answer = np.zeros(input_ids.shape, dtype=bool)
    predict_from, targets, segment_of = [], [], []
    for r, (block, segment) in enumerate(rows):
        start = len(block.prefix)
        end = start + len(segment)
        input_ids[r, :end] = block.prefix + segment.ids[:-1]
        attention_mask[r, :end] = 1
        is_answer[r, start:end] = segment.learned[:-1]
        learned = np.flatnonzero(segment.learned)
        predict_from.extend(r * length + start + learned - 1)
        targets.extend(np.asarray(segment.ids)[learned])
        segment_of.extend([r] * len(learned))
    tensors = dict(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=np.broadcast_to(np.arange(length), input_ids.shape).copy(),
        is_answer=is_answer,
        predict_from=np.asarray(predict_from, dtype=np.int64),
        targets=np.asarray(targets, dtype=np.int64),
        segment_of=np.asarray(segment_of, dtype=np.int64),
    )
    return {name: torch.from_numpy(array) for name, array in tensors.items()} | {
        "images": [image for block, segment in rows for image in (*block.images, *segment.images)]
    }


def useful_share(batch: dict) -> float:
    """Return the share of the positions of a batch that are not padding."""
    used = batch["block_ids"] >= 0 if "block_ids" in batch else batch["attention_mask"] > 0
    return used.float().mean().item()
