"""Other arithmetic of `blipren train`: bf16, the fused loss, a compiled model."""

import pytest
import torch
from torch._dynamo.utils import counters

from blipren import BliprenForConditionalGeneration, BliprenProcessor, modeling_blipren
from blipren.training.engine.trained_parts import compile_layers
from blipren.training.errors import UserError
from tests.stages.tools import events, weights


def test_bf16_trains_and_leaves_frozen_parts_as_they_were(plain_two_steps, deterministic_model):
    folder = plain_two_steps("bf16", precision="bf16")
    plain = plain_two_steps("plain")
    losses = [[e["loss"] for e in events(f, "train")] for f in (folder, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2) and losses[0] != losses[1]
    before, after = (
        BliprenForConditionalGeneration.from_pretrained(p).state_dict() for p in (deterministic_model, folder)
    )
    assert all(after[n].dtype == before[n].dtype for n in before)
    assert all(torch.equal(before[n], after[n]) for n in before if "language_model" in n)


def test_fused_loss_trains_to_the_same_weights(plain_two_steps, monkeypatch):
    monkeypatch.setattr(modeling_blipren, "LOSS_CHUNK", 3)  # several pieces of the few tokens here
    fused, plain = plain_two_steps("fused", fused_loss=True), plain_two_steps("plain")
    for kind in ("train", "validation"):
        losses = [[e["loss"] for e in events(folder, kind)] for folder in (fused, plain)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(fused)[name], tensor, rtol=1e-3, atol=1e-5)


def test_fused_loss_in_bf16(plain_two_steps):
    folders = (
        plain_two_steps("fused-bf16", fused_loss=True, precision="bf16"),
        plain_two_steps("bf16", precision="bf16"),
    )
    losses = [[e["loss"] for e in events(folder, "train")] for folder in folders]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_fused_loss_is_refused_where_logits_are_capped(plain_two_steps, deterministic_model, tmp_path):
    capped = tmp_path / "capped"
    model = BliprenForConditionalGeneration.from_pretrained(deterministic_model)
    model.config.text_config.final_logit_softcapping = 30.0
    model.save_pretrained(capped)
    BliprenProcessor.from_pretrained(deterministic_model).save_pretrained(capped)
    with pytest.raises(UserError, match="neither scaled nor capped"):
        plain_two_steps("capped", model=str(capped), fused_loss=True)


def test_compile_is_refused_where_it_would_compile_nothing(deterministic_model):
    model = BliprenForConditionalGeneration.from_pretrained(deterministic_model)
    model.model.language_model.layers = torch.nn.ModuleList()
    with pytest.raises(UserError, match="leave --compile out"):
        compile_layers(model, "aot_eager")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_model_trains_to_the_same_loss(plain_two_steps, backend):
    counters.clear()
    compiled = plain_two_steps(f"compiled-{backend}", compile=True, compile_backend=backend)
    assert counters["stats"]["unique_graphs"] > 0
    losses = [[e["loss"] for e in events(f, "validation")] for f in (plain_two_steps("plain"), compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
