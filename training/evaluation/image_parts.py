"""Whether the model uses each part of what it is shown: higher resolutions, the second encoder, the order of frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from blipren.training.evaluation.features import PatchFeatures
from blipren.training.evaluation.image_use import IGNORES_BELOW, loss_statistic
from blipren.training.evaluation.metrics.bootstrap import paired_difference

FINE, SECOND, ORDER = "the higher resolutions", "the second encoder", "the order of frames"


def exchange_parts(config, features: PatchFeatures, others: Sequence[int], seed: int) -> dict[str, PatchFeatures]:
    """Return for each part of the images the features with this part alone exchanged.

    Higher resolutions and the second encoder's features become those of another image; the frames of a video are
    shuffled. A model of one scale, encoder and frame has no parts.

    Args:
        others: another image for each.
    """
    # times of frames stay where they are: a frame that takes the place of another takes its time
    patches, times = features.patches.tensor_split([config.vision_hidden_size], dim=-1)
    found: dict[str, PatchFeatures] = {}
    exchanged = patches[list(others)]
    if config.pieces_are_a_sequence:
        pieces = config.vision_grid[0] * config.vision_grid[1]  # patches of the overview
        frames = 1 if config.vision_tiles is not None else patches.shape[1] // config.patches_per_frame
        mixed = exchanged.unflatten(1, (frames, -1)).clone()
        mixed[:, :, :pieces] = patches.unflatten(1, (frames, -1))[:, :, :pieces]
        mask = None if features.mask is None else features.mask[list(others)]
        found[FINE] = PatchFeatures(mixed.flatten(1, 2), mask)
    elif len(config.vision_scales) > 1:
        base = patches.shape[-1] // len(config.vision_scales)
        found[FINE] = PatchFeatures(torch.cat([patches[..., :base], exchanged[..., base:]], dim=-1), features.mask)
    if config.second_vision_config is not None:
        scales = 1 if config.pieces_are_a_sequence else len(config.vision_scales)
        mixed = patches.clone().unflatten(-1, (scales, -1))
        mixed[..., -config.second_hidden_size :] = exchanged.unflatten(-1, (scales, -1))[
            ..., -config.second_hidden_size :
        ]
        found[SECOND] = PatchFeatures(mixed.flatten(-2), features.mask)
    frames = patches.shape[1] // config.patches_per_frame if config.num_frames is not None else 1
    if frames > 1:
        rng = np.random.default_rng(seed)
        orders = torch.from_numpy(np.stack([rng.permutation(frames) for _ in range(len(patches))]))
        own = patches.unflatten(1, (frames, -1))
        found[ORDER] = PatchFeatures(own[torch.arange(len(own))[:, None], orders].flatten(1, 2))
    for part in found.values():
        part.patches = torch.cat([part.patches, times], dim=-1)
    return found


def part_use(
    right: Sequence[tuple[float, int]],
    losses: Mapping[str, Sequence[tuple[float, int]]],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict]:
    """Return for each part what its exchange adds to the loss, with the interval, and whether it is used or ignored.

    Args:
        right: (summed loss, tokens) of each image. losses: the same with a part exchanged.
    """
    found = {}
    base = loss_statistic(right)
    for part, values in losses.items():
        pair = paired_difference(base, loss_statistic(values), resamples, seed)
        ignored = pair.low <= 0 or pair.difference < IGNORES_BELOW * base.value
        gap = {"value": pair.difference, "low": pair.low, "high": pair.high}
        found[part] = {"loss_gap": gap, "verdict": "ignored" if ignored else "used"}
    return found
