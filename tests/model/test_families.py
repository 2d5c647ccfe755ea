"""Each supported family: a training step, generation, saving and loading; text logits equal to the LLM's own."""

import pytest
import torch
from tiny_models import LLM_FAMILIES, VISION_FAMILIES, random_image
from transformers import AutoModelForCausalLM

from blipren import BliprenForConditionalGeneration

PREFIX_TOKENS = {"clip_vision_model": 1, "vit": 1, "dinov2": 1, "dinov2_with_registers": 5, "dinov3_vit": 5}
PROMPTS = ["Short caption:", "What colour is the small ball ?"]


def check_train_generate_save_load(model, processor, folder):
    """Check a training step, equal tokens alone and in a left-padded batch, and both kinds of checkpoint."""
    images = [random_image(i) for i in range(2)]
    batch = processor(images=images, text=PROMPTS, return_tensors="pt")
    together = model.generate(**batch, max_new_tokens=6)[:, batch["input_ids"].shape[1] :]
    for row, image, prompt in zip(together, images, PROMPTS):
        single = processor(images=image, text=prompt, return_tensors="pt")
        alone = model.generate(**single, max_new_tokens=6)[0, single["input_ids"].shape[1] :]
        assert row[: len(alone)].tolist() == alone.tolist()

    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = model(**batch, labels=batch["input_ids"]).loss
    before.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    assert frozen and all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert torch.isfinite(before)

    logits = model(**batch).logits
    model.save_pretrained(folder / "full")
    model.save_bridge(folder / "bridge")
    for kind in ("full", "bridge"):
        again = BliprenForConditionalGeneration.from_pretrained(folder / kind)
        torch.testing.assert_close(again(**batch).logits, logits, rtol=0, atol=0)


@pytest.mark.parametrize("family", LLM_FAMILIES)
def test_language_model(family, pair, bases, tmp_path):
    model, processor = pair(llm=family)
    check_train_generate_save_load(model, processor, tmp_path)
    own = AutoModelForCausalLM.from_pretrained(bases("llm", family), dtype=torch.float32).eval()
    ids = torch.randint(3, own.config.vocab_size - 1, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    torch.testing.assert_close(
        model(input_ids=ids, attention_mask=mask).logits,
        own(input_ids=ids, attention_mask=mask).logits,
        rtol=1e-5,
        atol=1e-5,
    )
    assert model.get_input_embeddings().weight.shape[0] == own.config.vocab_size  # never resized


@pytest.mark.parametrize("connector", ["qformer", "patches"])
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_vision_encoder(family, connector, pair, tmp_path):
    model, processor = pair(vision=family, connector=connector, projector="mlp" if connector == "qformer" else "mlp2")
    check_train_generate_save_load(model, processor, tmp_path)
    assert model.config.num_prefix_tokens == PREFIX_TOKENS.get(family, 0)
    inputs = processor(images=random_image(), return_tensors="pt")
    pixels = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    features = model.encode_images(**pixels)
    if model.config.vision_grid:
        assert features.shape[1] == model.config.vision_grid[0] * model.config.vision_grid[1]
    outputs = model.model.vision_tower(**pixels).last_hidden_state
    if outputs.dim() == 4:
        torch.testing.assert_close(features, outputs.flatten(2).transpose(1, 2))
    else:  # class and register tokens are dropped; SigLIP has none
        torch.testing.assert_close(features, outputs[:, PREFIX_TOKENS.get(family, 0) :])


def test_full_selection_keeps_the_prefix(pair):
    model, processor = pair(vision="dinov2_with_registers", vision_feature_select="full", connector="patches")
    inputs = processor(images=random_image(), return_tensors="pt")
    assert model.encode_images(inputs["pixel_values"]).shape[1] == 16 + 5 == processor.num_visual_tokens
    assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize(
    "family, layers", [("siglip_vision_model", [-2, -1]), ("mobilenet_v2", [10, -1]), ("convnext", [2, -1])]
)
def test_several_layers(family, layers, pair):
    model, processor = pair(vision=family, vision_feature_layer=layers)
    inputs = processor(images=random_image(), return_tensors="pt")
    features = model.encode_images(inputs["pixel_values"])
    assert features.shape[1:] == (
        model.config.vision_grid[0] * model.config.vision_grid[1],
        model.config.vision_hidden_size,
    )
    last = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state
    last = last.flatten(2).transpose(1, 2) if last.dim() == 4 else last
    torch.testing.assert_close(features[..., -last.shape[-1] :], last)


def test_naflex_masks_padding(pair):
    """Padding patches of a NaFlex image change neither the Q-Former's output nor the number of visual tokens."""
    model, processor = pair(vision="siglip2_vision_model", connector="qformer")
    inputs = processor(images=random_image(size=(64, 24)), return_tensors="pt")
    mask = inputs["pixel_attention_mask"]
    assert 0 < mask.sum() < mask.numel()
    features = model.encode_images(inputs["pixel_values"], mask, inputs["spatial_shapes"])
    changed = torch.where(mask.bool().unsqueeze(-1), features, torch.full_like(features, 7.0))
    first = model.get_image_features(patch_features=features, patch_attention_mask=mask).pooler_output[0]
    second = model.get_image_features(patch_features=changed, patch_attention_mask=mask).pooler_output[0]
    torch.testing.assert_close(first, second)
    patches, processor = pair(vision="siglip2_vision_model", connector="patches")
    inputs = processor(images=random_image(size=(64, 24)), return_tensors="pt")
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == int(mask.sum())
    assert torch.isfinite(patches(**inputs).logits).all()
