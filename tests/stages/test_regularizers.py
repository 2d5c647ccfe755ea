"""Regularizers, the average of the weights, and label smoothing of `blipren train`."""

import pytest
import torch
from safetensors.torch import load_file

from blipren.training.data.batches.masks import shared_prefix_mask
from blipren.training.objectives.likelihood import answer_losses
from tests.stages.tools import events, weights

REGULARIZERS = {
    "word_dropout": 0.5, "feature_dropout": 0.5, "feature_noise": 1.0, "label_smoothing": 0.3, "ema": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", REGULARIZERS)
def test_regularizers_change_training(plain_two_steps, name):
    a, b = weights(plain_two_steps("plain")), weights(plain_two_steps(name, **{name: REGULARIZERS[name]}))
    assert any(not torch.equal(a[k], b[k]) for k in a)


def test_average_of_the_weights_is_kept(plain_two_steps, deterministic_model):
    """Two steps from w0 through w1 to w2: decays 1/10 and 2/11, the warm-up's, below the 0.5 that was asked for."""
    averaged = weights(plain_two_steps("ema", ema=0.5))
    start = {f"{n}": t for n, t in weights(deterministic_model).items()}
    first = load_file(plain_two_steps("first", save_every=1) / "checkpoints" / "checkpoint-1" / "trained.safetensors")
    last = weights(plain_two_steps("plain"))
    for name, tensor in averaged.items():
        one = start[name].lerp(first[name], 0.9)
        torch.testing.assert_close(tensor, one.lerp(last[name], 9 / 11), rtol=1e-5, atol=1e-6)


def test_regularizers_leave_validation_alone(plain_two_steps):
    still = {"learning_rate": 1e-30, "weight_decay": 0.0}
    folders = plain_two_steps("still", **still), plain_two_steps("all-still", **still, **REGULARIZERS)
    losses = [events(folder, "validation")[-1]["loss"] for folder in folders]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_word_dropout_hides_words_from_others_only():
    block, segment = torch.tensor([[0, 0, 0, 0, -1]]), torch.tensor([[0, 1, 1, 1, 0]])
    mask = shared_prefix_mask(block, segment, torch.float32)[0, 0]
    unseen = torch.tensor([[False, False, True, False, False]])
    hidden = shared_prefix_mask(block, segment, torch.float32, unseen)[0, 0]
    assert hidden[2, 2] == 0 and hidden[3, 2] < -1e30 and mask[3, 2] == 0
    assert torch.equal(hidden[:, [0, 1, 3, 4]], mask[:, [0, 1, 3, 4]])


def test_answer_losses_equal_torch():
    logits, targets = torch.randn(7, 11), torch.randint(11, (7,))
    nll, objective = answer_losses(logits, targets, 0.2)
    cross_entropy = torch.nn.functional.cross_entropy
    torch.testing.assert_close(nll, cross_entropy(logits, targets, reduction="sum"))
    torch.testing.assert_close(objective, cross_entropy(logits, targets, reduction="sum", label_smoothing=0.2))
