"""The mixture-of-experts projector in training: its losses weighed by the settings, its load in the log."""

import pytest
import torch

from blipren.training.engine.loading import load_checkpoint
from blipren.training.engine.model_setup import load_to_train
from blipren.training.stages import train as caption
from tests.stages.tools import events, make_model


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory, bases):
    """A model whose router sends nearly every image to expert 0."""
    folder = tmp_path_factory.mktemp("moe") / "model"
    make_model(folder, *bases, projector="moe", projector_options={"num_experts": 4, "projector_hidden_size": 32})
    model, _ = load_checkpoint(str(folder))
    with torch.no_grad():
        model.model.projector.router[-1].bias.copy_(torch.tensor([4.0, 0.0, 0.0, 0.0]))
    model.save_bridge(folder)
    return folder


def loads(folder):
    last = events(folder, "train")[-1]
    return [last[f"expert_{i}"] for i in range(4)]


def test_balance_loss_uncollapses_a_collapsed_router(settings, tmp_path, collapsed):
    values = dict(model=str(collapsed), max_steps=60, batch_size=16, learning_rate=5e-3, log_every=60, eval_every=60)
    caption.train(settings(**values, router_balance_weight=0.0, router_z_weight=0.0))
    caption.train(settings(**values, router_balance_weight=10.0, out=str(tmp_path / "balanced")))
    first = [e for e in events(tmp_path / "balanced", "train") if e["step"] == 1][0]
    assert first["expert_0"] > 0.8
    alone, balanced = loads(tmp_path / "run"), loads(tmp_path / "balanced")
    assert sum(alone) == pytest.approx(1) and sum(balanced) == pytest.approx(1)
    assert max(balanced) < 0.5 < max(alone)


def test_weights_and_noise_come_from_the_settings(settings, collapsed):
    model, _ = load_to_train(str(collapsed), settings(router_noise=0.5, router_z_weight=0.25))
    assert (model.config.router_noise, model.config.router_z_weight) == (0.5, 0.25)
    assert model.config.router_balance_weight == 0.01  # the checkpoint's own
    features = torch.randn(3, 16, model.config.vision_hidden_size)
    model.train()
    noisy = [model.get_image_features(patch_features=features).router_probs for _ in range(2)]
    assert not torch.equal(*noisy)
    model.eval()
    assert torch.equal(*(model.get_image_features(patch_features=features).router_probs for _ in range(2)))
    assert model.get_image_features(patch_features=features).router_aux_loss is None
