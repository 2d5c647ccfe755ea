"""Whether the model uses its image: losses and scores with the right image, another image, a black one and none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from blipren.training.evaluation.features import PatchFeatures
from blipren.training.evaluation.generation import pad_id, pad_right
from blipren.training.evaluation.metrics.bootstrap import Statistic, interval, mean_statistic, paired_difference

CONDITIONS = ("right", "shuffled", "black", "none")
IGNORES, HARDLY, USES = "ignores its image", "hardly uses its image", "looks at its image"
IGNORES_BELOW, HARDLY_BELOW = 0.005, 0.03
"""Share of the loss that another image has to add, below which the model ignores or hardly uses its image."""
KEPT_ABOVE = 0.5
"""Share of the score that is left with another image, above which a small loss gap means that the image is hardly used."""


@torch.no_grad()
def answer_losses(
    model,
    processor,
    features: PatchFeatures | None,
    prompts: Sequence[str | None],
    answers: Sequence[str],
    batch_size: int = 32,
) -> list[tuple[float, int]]:
    """Compute the negative log-likelihood (nats, summed) and number of tokens of each answer with its end token.

    Args:
        features: the image of each answer; None leaves the image out of the prompt and keeps the rest.
    """
    counts = [None] * len(answers) if features is None else features.visual_tokens(model.config)
    rows = []
    for prompt, count, answer in zip(prompts, counts, answers):
        prompt_ids = processor.encode_prompt(prompt, num_visual_tokens=[] if count is None else [count])
        rows.append((list(prompt_ids), list(processor.encode_answer(answer))))
    results: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = {} if features is None else features[chosen].model_inputs(model.device)
        pad = pad_id(model, processor)
        for i, loss in zip(chosen, token_losses(model, [rows[i] for i in chosen], pad, inputs)):
            results[i] = loss
    return results


@torch.no_grad()
def token_losses(
    model, rows: Sequence[tuple[list[int], list[int]]], pad_token_id: int, inputs: dict[str, torch.Tensor]
) -> list[tuple[float, int]]:
    """Compute the summed negative log-likelihood (nats) and number of tokens of one batch of answers.

    Args:
        rows: `(prompt ids, answer ids)`.
        inputs: of the images of all prompts, in order.
    """
    ids, mask = pad_right([prompt + answer for prompt, answer in rows], pad_token_id)
    # token t is predicted at position t - 1; only those logits are computed
    spans = [(row, len(prompt), len(answer)) for row, (prompt, answer) in enumerate(rows)]
    at = torch.cat([row * ids.shape[1] + torch.arange(p - 1, p + n - 1) for row, p, n in spans])
    logits = model(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        logits_at=at.to(model.device),
        **inputs,
    ).logits
    losses = F.cross_entropy(logits.float().cpu(), ids.flatten()[at + 1], reduction="none")
    return [(float(own.sum()), len(own)) for own in losses.split([n for _, _, n in spans])]


def other_images(count: int, seed: int) -> list[int]:
    """Return for each of `count` images the index of another one. A rotation, so no image keeps its own. Empty for one."""
    if count < 2:
        return []
    shift = 1 + int(np.random.default_rng(seed).integers(count - 1))
    return [(i + shift) % count for i in range(count)]


def loss_statistic(losses: Sequence[tuple[float, int]]) -> Statistic:
    """Return the loss per answer token over images, as training computes it."""
    return Statistic(np.array(losses, dtype=np.float64), lambda sums: sums[..., 0] / sums[..., 1])


def verdict(right: float, gap: float, gap_low: float, score_kept: float | None = None) -> str:
    """Return one of `IGNORES`, `HARDLY`, `USES`.

    Args:
        right: loss with the right image. gap, gap_low: what another image adds to it, and the interval's lower end.
        score_kept: share of the caption or answer score that is left with another image. The loss of a reference changes
            little even for a good model, since most of its words are grammar, so a score that falls by half counts more.
    """
    if gap_low <= 0 or gap < IGNORES_BELOW * right:
        return IGNORES
    if gap < HARDLY_BELOW * right and (score_kept is None or score_kept > KEPT_ABOVE):
        return HARDLY
    return USES


def image_use(
    losses: Mapping[str, Sequence[tuple[float, int]]],
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    resamples: int = 1000,
    seed: int = 0,
) -> dict:
    """Return the values of each condition and the verdict.

    Args:
        losses: condition -> (summed loss, tokens) of each image, `right` and `shuffled` at least.
        scores: metric -> condition -> score of each image.

    Returns:
        `loss` and each metric by condition, `loss_gap` (another image minus the right one, with its interval),
        `loss_gap_to_none`, `verdict` (a few words) and `because` (a sentence).
    """
    statistics = {name: loss_statistic(values) for name, values in losses.items()}
    result: dict = {"loss": {name: s.value for name, s in statistics.items()}}
    result["loss_intervals"] = {name: interval(s, resamples, seed) for name, s in statistics.items()}
    right = statistics["right"].value
    if "shuffled" not in statistics:
        return result | {"verdict": "unknown", "because": "One image alone cannot be exchanged for another."}
    pair = paired_difference(statistics["right"], statistics["shuffled"], resamples, seed)
    result["loss_gap"] = {"value": pair.difference, "low": pair.low, "high": pair.high}
    if "none" in statistics:
        gap = paired_difference(statistics["right"], statistics["none"], resamples, seed)
        result["loss_gap_to_none"] = {"value": gap.difference, "low": gap.low, "high": gap.high}
    for metric, by_condition in scores.items():
        result[metric] = {name: mean_statistic(values).value for name, values in by_condition.items()}
    result["images"] = len(losses["right"])
    kept = [
        result[m]["shuffled"] / result[m]["right"]
        for m in scores
        if "shuffled" in scores[m] and result[m]["right"] > 0
    ]
    result["verdict"] = verdict(right, pair.difference, pair.low, min(kept, default=None))
    result["because"] = (
        f"Another image in place of the right one changes the loss of the reference from {right:.3f} to "
        f"{statistics['shuffled'].value:.3f} nats a token: {pair.difference:+.3f}, {100 * pair.difference / right:+.1f}% "
        f"(95% interval {pair.low:+.3f} to {pair.high:+.3f})"
    )
    for metric, by_condition in scores.items():
        if "shuffled" in by_condition:
            values = result[metric]
            result["because"] += f"; {metric} from {values['right']:.3f} to {values['shuffled']:.3f}"
    result["because"] += "."
    return result
