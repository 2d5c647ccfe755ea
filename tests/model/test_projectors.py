"""Projectors: their scale at the start, the mixture of experts, widths."""

import pytest
import torch
from tiny_models import random_image

from blipren import (
    BliprenConfig,
)
from blipren.projector_blipren import BliprenMoeProjector
from tests.model.test_model import CAPTIONS, supervised


@pytest.mark.parametrize("projector", ["linear", "mlp2", "mlp", "moe"])
@pytest.mark.parametrize("connector", ["qformer", "patches"])
def test_projectors_start_at_the_scale_of_embeddings(projector, connector, pair):
    model, processor = pair(projector=projector, connector=connector)
    features = model(**processor(images=random_image(), return_tensors="pt")).image_hidden_states
    embeddings = model.get_input_embeddings().weight
    assert 0.1 < features.square().mean().sqrt() / embeddings.square().mean().sqrt() < 10


def moe(**values) -> tuple[BliprenMoeProjector, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    config = BliprenConfig(projector="moe", vision_hidden_size=12, num_experts=4, **values)
    config.qformer_config.hidden_size = 8
    return BliprenMoeProjector(config, 6), torch.randn(5, 3, 8), torch.randn(5, 7, 12)


def test_moe_routes_each_image_by_its_pooled_patches():
    projector, states, patches = moe()
    mixed, probs, aux = projector.train()(states, patches, None)
    assert mixed.shape == (5, 3, 6) and aux is not None
    torch.testing.assert_close(probs.sum(-1), torch.ones(5))
    expected = sum(probs[:, e, None, None] * expert(states) for e, expert in enumerate(projector.experts))
    torch.testing.assert_close(mixed, expected)
    moved = patches.clone()
    moved[:, [0, 1]] = moved[:, [1, 0]]  # the order of patches does not matter
    torch.testing.assert_close(projector(states, moved, None)[1], probs)
    mask = torch.ones(5, 7)
    mask[:, 5:] = 0
    padded = patches.clone()
    padded[:, 5:] = 99.0
    torch.testing.assert_close(projector(states, padded, mask)[1], projector(states, patches[:, :5], None)[1])


def test_moe_top_k_uses_k_experts_and_their_normalised_weights():
    projector, states, patches = moe(experts_top_k=2)
    mixed, probs, _ = projector.eval()(states, patches, None)
    values, chosen = probs.topk(2)
    for image in range(5):
        weights = values[image] / values[image].sum()
        expected = sum(w * projector.experts[e](states[image]) for w, e in zip(weights, chosen[image]))
        torch.testing.assert_close(mixed[image], expected)


def test_moe_top_1_weighs_its_expert_by_its_probability_which_trains_the_router():
    projector, states, patches = moe(experts_top_k=1)
    mixed, probs, _ = projector.eval()(states, patches, None)
    for image in range(5):
        expected = probs[image].max() * projector.experts[probs[image].argmax()](states[image])
        torch.testing.assert_close(mixed[image], expected)
    mixed.square().sum().backward()
    assert projector.router[-1].weight.grad.abs().max() > 1e-3


def test_moe_losses_are_smallest_when_balanced_and_part_of_the_loss(pair):
    projector, states, patches = moe(router_balance_weight=1.0, router_z_weight=0.0)
    projector.train()
    torch.nn.init.zeros_(projector.router[-1].weight)
    torch.nn.init.zeros_(projector.router[-1].bias)
    torch.testing.assert_close(projector(states, patches, None)[2], torch.tensor(1.0))
    projector.router[-1].bias.data[0] = 9.0
    assert projector(states, patches, None)[2] > 3.5  # all images go to one of four experts
    model, processor = pair(projector="moe", projector_options={"router_noise": 0.5})
    batch = supervised(processor, CAPTIONS, [random_image(i) for i in range(3)])
    assert model(**batch).router_aux_loss is None and model(**batch).router_probs.shape == (3, 4)
    model.config.router_noise = 0.0
    plain = model(**batch).loss
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for module in model.model.qformer.layers:
        module.self_attention.dropout = 0.0
        if module.has_cross_attention:
            module.cross_attention.dropout = 0.0
    trained = model(**batch)
    torch.testing.assert_close(trained.loss, plain + trained.router_aux_loss)


def test_opt_projector_has_the_width_of_the_embeddings(pair):
    model, _ = pair(llm="opt")
    assert model.config.text_config.hidden_size == 32 and model.model.projector.fc2.out_features == 16
