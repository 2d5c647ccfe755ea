"""Position embeddings on patch features, a setting of the Q-Former."""

import pytest
import torch
from tiny_models import QFORMER

from blipren import BliprenForConditionalGeneration, BliprenQFormerConfig
from blipren.qformer_blipren import BliprenQFormer

SIZES = {
    "initializer_range": 0.5,
    "query_init_std": 1.0,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "encoder_hidden_size": 8,
    "num_query_tokens": 3,
}


def make_qformer(**options):
    torch.manual_seed(0)
    return BliprenQFormer(BliprenQFormerConfig(**SIZES, **options)).eval()


@pytest.mark.parametrize("project", [False, True])
def test_they_tell_where_a_patch_is(project):
    """Without them the order of the patches changes nothing; with them it does."""
    features = torch.randn(2, 6, 8)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    plain = make_qformer(project_patches=project)
    torch.testing.assert_close(plain(features).query_states, plain(features[:, order]).query_states)
    placed = make_qformer(project_patches=project, patch_position_embeddings=True, num_patches=6)
    placed.patch_position_embeddings.weight.data.normal_()
    expected = placed(features).query_states
    assert (expected - placed(features[:, order]).query_states).abs().max() > 1e-2
    table = placed.patch_position_embeddings.weight
    table.data = table.data[order]  # positions that move with the patches change nothing
    torch.testing.assert_close(placed(features[:, order]).query_states, expected)


def test_without_the_setting_nothing_changes():
    plain, off = make_qformer(), make_qformer(patch_position_embeddings=False)
    assert plain.state_dict().keys() == off.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), off.state_dict().values()))


def test_a_new_model_has_one_for_each_patch(bases):
    options = {"num_queries": 4, "qformer": QFORMER | {"patch_position_embeddings": True}}
    vision, llm = bases("vision", "siglip_vision_model"), bases("llm", "llama")
    model = BliprenForConditionalGeneration.from_vision_text_pretrained(vision, llm, **options)
    grid = model.config.vision_grid
    assert model.model.qformer.patch_position_embeddings.num_embeddings == grid[0] * grid[1]
    assert model.config.qformer_config.num_patches == grid[0] * grid[1]


def test_numbers_of_patches_have_to_fit():
    with pytest.raises(ValueError, match="needs num_patches"):
        BliprenQFormerConfig(patch_position_embeddings=True)
    qformer = make_qformer(patch_position_embeddings=True, num_patches=6)
    with pytest.raises(ValueError, match="images have 5 patches, and the Q-Former has position embeddings for 6"):
        qformer(torch.randn(1, 5, 8))
