"""Rows of a notebook's training loop: one per caption, padded, with labels."""

import torch


def padded_with_labels(rows: list[tuple[int, list[int], list[int]]], length: int, pad: int) -> dict[str, torch.Tensor]:
    """Return `input_ids`, `attention_mask` and `labels` (-100 outside the answer) of rows (image, prompt ids, answer ids),
    each [rows, length], right-padded."""
    ids = torch.full((len(rows), length), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for r, (_, prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[r, :end] = torch.tensor(prompt + answer)
        mask[r, :end] = 1
        labels[r, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
