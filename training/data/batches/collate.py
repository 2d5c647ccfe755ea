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
        `targets` `[targets]`: the token `targets[i]` is predicted at the flat position `predict_from[i]`; `images`: the
        `(cache, image)` pairs in the order of their placeholders.
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
    predict_from, targets, images = [], [], []
    for r, row in enumerate(rows):
        cursor = 0
        for number, b in enumerate(row):
            block, start = blocks[b], cursor
            images.append(block.image)
            behind_prefix = start + len(block.prefix)
            input_ids[r, start:behind_prefix] = block.prefix
            position_ids[r, start:behind_prefix] = np.arange(len(block.prefix))
            cursor = behind_prefix
            for s, (prompt, answer) in enumerate(block.segments, start=1):
                answer_at = cursor + len(prompt)
                end = answer_at + len(answer) - 1
                input_ids[r, cursor:end] = prompt + answer[:-1]
                position_ids[r, cursor:end] = len(block.prefix) + np.arange(end - cursor)
                segment_ids[r, cursor:end] = s
                is_answer[r, answer_at:end] = True
                predicting = [answer_at - 1 if prompt else behind_prefix - 1, *range(answer_at, end)]
                predict_from.extend(r * length + p for p in predicting)
                targets.extend(answer)
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
    )
    return {name: torch.from_numpy(array) for name, array in tensors.items()} | {"images": images}


def collate_padded(blocks: list[Block], pad_token_id: int, multiple: int = 1) -> dict:
    """Collate each answer into a right-padded row of its own; image and prompt are repeated.

    Returns:
        `input_ids`, `attention_mask`, `position_ids` `[rows, length]`, and `is_answer`, `predict_from`, `targets`,
        `images` as from `collate_shared`.
    """
    rows = [(block, prompt, answer) for block in blocks for prompt, answer in block.segments]
    length = max(len(block.prefix) + len(prompt) + len(answer) - 1 for block, prompt, answer in rows)
    length = -(-length // multiple) * multiple
    input_ids = np.full((len(rows), length), pad_token_id, dtype=np.int64)
    attention_mask = np.zeros((len(rows), length), dtype=np.int64)
    is_answer = np.zeros(input_ids.shape, dtype=bool)
    predict_from, targets = [], []
    for r, (block, prompt, answer) in enumerate(rows):
        answer_at = len(block.prefix) + len(prompt)
        end = answer_at + len(answer) - 1
        input_ids[r, :end] = block.prefix + prompt + answer[:-1]
        attention_mask[r, :end] = 1
        is_answer[r, answer_at:end] = True
        predict_from.extend(range(r * length + answer_at - 1, r * length + end))
        targets.extend(answer)
    tensors = dict(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=np.broadcast_to(np.arange(length), input_ids.shape).copy(),
        is_answer=is_answer,
        predict_from=np.asarray(predict_from, dtype=np.int64),
        targets=np.asarray(targets, dtype=np.int64),
    )
    return {name: torch.from_numpy(array) for name, array in tensors.items()} | {
        "images": [block.image for block, _, _ in rows]
    }


def useful_share(batch: dict) -> float:
    """Return the share of the positions of a batch that are not padding."""
    used = batch["block_ids"] >= 0 if "block_ids" in batch else batch["attention_mask"] > 0
    return used.float().mean().item()
