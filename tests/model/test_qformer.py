"""The Q-Former: shapes, cross-attention, equality with BLIP-2, weights of BERT."""

import pytest
import torch
from tiny_models import QFORMER
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
)

from blipren import (
    BliprenQFormer,
    BliprenQFormerConfig,
)
from blipren.qformer_weights_blipren import copy_bert_weights, copy_blip2_weights


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("frequency", [1, 2])
def test_qformer_shapes_norms_and_cross_attentions(norm_position, frequency):
    config = BliprenQFormerConfig(
        **QFORMER,
        num_query_tokens=5,
        encoder_hidden_size=12,
        norm_position=norm_position,
        cross_attention_frequency=frequency,
    )
    qformer = BliprenQFormer(config).eval()
    patches = torch.randn(2, 7, 12)
    sdpa, explicit = qformer(patches), qformer(patches, output_attentions=True)
    assert sdpa.cross_attentions is None and len(explicit.cross_attentions) == 2 // frequency
    torch.testing.assert_close(sdpa.query_states, explicit.query_states)
    for weights in explicit.cross_attentions:
        assert weights.shape == (2, 4, 5, 7)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))


def tiny_blip2() -> Blip2ForConditionalGeneration:
    torch.manual_seed(0)
    vision = Blip2VisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    qformer = Blip2QFormerConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, encoder_hidden_size=24
    )
    text = OPTConfig(hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=60)
    text.word_embed_proj_dim = 16
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=5,
    )
    model = Blip2ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.query_tokens)
    return model


def test_blip2_weights_give_blip2_outputs():
    theirs = tiny_blip2()
    config = BliprenQFormerConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        num_query_tokens=5,
        encoder_hidden_size=24,
    )
    ours = BliprenQFormer(config).eval()
    copy_blip2_weights(ours, theirs.state_dict())
    pixels = torch.randn(3, 3, 28, 28)
    patches = theirs.vision_model(pixels).last_hidden_state  # class token included: vision_feature_select="full"
    expected = theirs.qformer(
        query_embeds=theirs.query_tokens.expand(3, -1, -1), encoder_hidden_states=patches
    ).last_hidden_state
    assert (ours(patches).query_states - expected).abs().max() < 1e-5
    with pytest.raises(ValueError, match="lack"):
        copy_blip2_weights(ours, {k: v for k, v in theirs.state_dict().items() if "layer.3." not in k})


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_qformer_starts_from_bert(kind):
    from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

    torch.manual_seed(0)
    if kind == "bert":
        bert = BertModel(
            BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50)
        )
    else:
        bert = DistilBertModel(DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=50))
    bert.eval()
    config = BliprenQFormerConfig(**QFORMER, use_text=True, vocab_size=50, encoder_hidden_size=12)
    qformer = BliprenQFormer(config).eval()
    new = qformer.layers[0].cross_attention.query.weight.clone()
    copied = copy_bert_weights(qformer, bert)
    assert torch.equal(qformer.layers[0].cross_attention.query.weight, new)
    assert not any("cross_attention" in name or "query_tokens" in name for name in copied)
    ids = torch.randint(1, 50, (2, 6))
    expected = bert(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(qformer(input_ids=ids).text_states, expected, rtol=1e-4, atol=1e-5)
    narrow = BliprenQFormer(BliprenQFormerConfig(**{**QFORMER, "hidden_size": 16}))
    with pytest.raises(ValueError, match="32 wide"):
        copy_bert_weights(narrow, bert)
