"""The model: pixels and patch features, labels, token counts, freezing, base models."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import QFORMER, random_image
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from blipren import (
    BliprenForConditionalGeneration,
    BliprenModel,
    BliprenProcessor,
)


@pytest.fixture(scope="module")
def tiny(pair):
    return pair()


def supervised(processor, captions, images):
    """Return a left-padded batch of prompts and answers, with labels on answers only."""
    rows = [(processor.encode_prompt(), processor.encode_answer(c)) for c in captions]
    length = max(len(p) + len(a) for p, a in rows)
    pad = processor.tokenizer.pad_token_id
    gaps = [length - len(p) - len(a) for p, a in rows]
    return {
        "input_ids": torch.tensor([[pad] * g + p + a for g, (p, a) in zip(gaps, rows)]),
        "attention_mask": torch.tensor([[0] * g + [1] * (length - g) for g in gaps]),
        "labels": torch.tensor([[-100] * (g + len(p)) + a for g, (p, a) in zip(gaps, rows)]),
        "pixel_values": processor(images=images, return_tensors="pt")["pixel_values"],
    }


CAPTIONS = ["A dog runs .", "Two children play with a red ball on the beach .", "A man ."]


def test_pixels_and_cached_features_give_the_same_loss(tiny):
    model, processor = tiny
    batch = supervised(processor, CAPTIONS, [random_image(i) for i in range(3)])
    from_pixels = model(**batch)
    features = model.encode_images(batch.pop("pixel_values"))
    from_cache = model(**batch, patch_features=features)
    assert abs(from_pixels.loss - from_cache.loss).item() < 1e-5
    torch.testing.assert_close(from_pixels.image_hidden_states, from_cache.image_hidden_states)


def test_padded_batch_is_the_mean_of_its_rows_by_answer_tokens(tiny):
    model, processor = tiny
    images = [random_image(i) for i in range(3)]
    whole = model(**supervised(processor, CAPTIONS, images)).loss
    total = tokens = 0.0
    for caption, image in zip(CAPTIONS, images):
        row = supervised(processor, [caption], [image])
        count = int((row["labels"] != -100).sum())
        total += model(**row).loss * count
        tokens += count
    torch.testing.assert_close(whole, total / tokens, rtol=1e-5, atol=1e-5)


def test_loss_is_divided_by_the_global_number_of_tokens(tiny):
    model, processor = tiny
    batch = supervised(processor, CAPTIONS, [random_image(i) for i in range(3)])
    count = int((batch["labels"] != -100).sum())
    torch.testing.assert_close(model(**batch, num_items_in_batch=2 * count).loss, model(**batch).loss / 2)


def test_labels_never_cover_image_tokens_or_padding(tiny):
    model, processor = tiny
    batch = supervised(processor, CAPTIONS, [random_image(i) for i in range(3)])
    everything = {**batch, "labels": batch["input_ids"].clone()}
    logits = model(**everything).logits[:, :-1]
    target = batch["input_ids"][:, 1:].clone()
    target[(batch["attention_mask"][:, 1:] == 0) | (target == processor.image_token_id)] = -100
    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)
    torch.testing.assert_close(model(**everything).loss, expected)


def test_label_logits_only_computes_the_same_loss(tiny):
    model, processor = tiny
    batch = supervised(processor, CAPTIONS, [random_image(i) for i in range(3)])
    full, only = model(**batch), model(**batch, label_logits_only=True)
    torch.testing.assert_close(full.loss, only.loss)
    assert only.logits.shape[0] == int((batch["labels"] != -100).sum())
    with pytest.raises(ValueError, match="needs labels"):
        model(**{k: v for k, v in batch.items() if k != "labels"}, label_logits_only=True)


def test_counts_that_do_not_match_are_an_error(tiny):
    model, processor = tiny
    batch = dict(processor(images=[random_image(0), random_image(1)], return_tensors="pt"))
    with pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: 8, features: 4"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:1]})
    batch.pop("pixel_values")
    with pytest.raises(ValueError, match="tokens: 8, features: 0"):
        model(**batch)
    with pytest.raises(ValueError, match="another vision encoder"):
        model(**batch, patch_features=torch.zeros(2, 16, 33))


def test_several_images_and_none(tiny):
    model, processor = tiny
    a, b = random_image(0), random_image(1)
    two = processor(images=[a, b], text="What differs ?", return_tensors="pt")
    assert (two["input_ids"] == processor.image_token_id).sum() == 8 and two["pixel_values"].shape[0] == 2
    swapped = processor(images=[b, a], text="What differs ?", return_tensors="pt")
    assert not torch.allclose(model(**two).logits[:, -1], model(**swapped).logits[:, -1])
    none = processor(text="Only words here", return_tensors="pt")
    assert model.generate(**none, max_new_tokens=4).shape[1] <= none["input_ids"].shape[1] + 4
    mixed = processor(images=[[a, b], [a]], text=["What differs ?", "What is it ?"], return_tensors="pt")
    row = model.generate(**mixed, max_new_tokens=5)[0, mixed["input_ids"].shape[1] :]
    alone = model.generate(**two, max_new_tokens=5)[0, two["input_ids"].shape[1] :]
    assert row[: len(alone)].tolist() == alone.tolist()


def test_generate_from_cached_features_with_beams(tiny):
    model, processor = tiny
    batch = dict(processor(images=[random_image(0), random_image(1)], return_tensors="pt"))
    wanted = model.generate(**batch, num_beams=3, max_new_tokens=6)
    features = model.encode_images(batch.pop("pixel_values"))
    assert torch.equal(model.generate(**batch, patch_features=features, num_beams=3, max_new_tokens=6), wanted)


def test_frozen_parts_stay_in_eval_mode(pair):
    model, processor = pair(llm="gpt2")  # its dropout is 0.1
    for call in (model.train, model.model.train):
        call()
        assert not model.model.vision_tower.training and not model.model.language_model.training
        assert model.model.qformer.training
    model.model.vision_tower.train()
    model.model.language_model.train()
    model.train()
    assert not any(m.training for m in model.model.language_model.modules())
    model.model.vision_tower.train()
    features = model.encode_images(processor(images=random_image(), return_tensors="pt")["pixel_values"])
    assert not features.requires_grad and not model.model.vision_tower.training
    assert {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad} == {"qformer", "projector"}
    model.freeze(train=["projector"])
    assert not model.model.qformer.training and model.model.projector.training
    with pytest.raises(ValueError, match="no part 'eyes'"):
        model.freeze(train=["eyes"])


def test_encoder_decoder_is_refused(bases, tmp_path):
    from transformers import T5Config

    T5Config(d_model=16, d_ff=32, num_layers=1, num_heads=2, vocab_size=50).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="decoder-only"):
        BliprenForConditionalGeneration.from_vision_text_pretrained(bases("vision", "vit"), tmp_path)


def test_bridge_refuses_other_base_weights(bases, tmp_path):
    from tiny_models import make_llm

    llm = make_llm(tmp_path / "llm", "llama")
    model = BliprenForConditionalGeneration.from_vision_text_pretrained(
        bases("vision", "vit"), llm, num_queries=4, qformer=QFORMER
    )
    model.save_bridge(tmp_path / "bridge")
    assert sum(f.stat().st_size for f in (tmp_path / "bridge").glob("*.safetensors")) < 400_000
    make_llm(tmp_path / "llm", "llama", seed=1)
    with pytest.raises(ValueError, match="whose weights differ"):
        BliprenForConditionalGeneration.from_pretrained(tmp_path / "bridge")
    model.freeze(train=["connector", "llm"])
    with pytest.raises(ValueError, match="llm model was trained"):
        model.save_bridge(tmp_path / "other")


def test_attention_implementations_agree(bases, tmp_path):
    folders = bases("vision", "siglip_vision_model"), bases("llm", "llama")
    model = BliprenForConditionalGeneration.from_vision_text_pretrained(*folders, num_queries=4, qformer=QFORMER)
    processor = BliprenProcessor.from_vision_text_pretrained(*folders, num_queries=4)
    model.save_pretrained(tmp_path)
    inputs = processor(images=random_image(), return_tensors="pt")
    logits = {
        name: BliprenForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=name)(**inputs).logits
        for name in ("eager", "sdpa")
    }
    torch.testing.assert_close(logits["eager"], logits["sdpa"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_only_the_image_tower_of_a_two_tower_checkpoint_is_taken(kind, bases, tmp_path):
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    vision = bases("vision", f"{kind}_vision_model")
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 60,
    }
    values = {"projection_dim": 32} if kind == "clip" else {}
    both = AutoModel.from_config(
        AutoConfig.for_model(
            kind, vision_config=AutoConfig.from_pretrained(vision).to_dict(), text_config=text, **values
        )
    ).eval()
    both.save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(vision).save_pretrained(tmp_path)
    model = BliprenForConditionalGeneration.from_vision_text_pretrained(
        tmp_path, bases("llm", "llama"), num_queries=4, qformer=QFORMER
    )
    pixels = torch.randn(1, 3, 32, 32)
    expected = both.vision_model(pixels).last_hidden_state
    torch.testing.assert_close(model.encode_images(pixels), expected[:, 1:] if kind == "clip" else expected)


def test_a_base_that_lacks_weights_is_refused(bases, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    for kind, family, lost in (("vision", "vit", "layer.1"), ("llm", "llama", "layers.1.mlp")):
        folder = tmp_path / kind
        shutil.copytree(bases(kind, family), folder)
        weights = load_file(folder / "model.safetensors")
        kept = {k: v for k, v in weights.items() if lost not in k and "pooler" not in k}
        assert len(kept) < len(weights)
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        vision, llm = (folder, bases("llm", "llama")) if kind == "vision" else (bases("vision", "vit"), folder)
        with pytest.raises(
            ValueError, match=rf"lacks \d+ weights of its architecture, such as .*{lost.split('.')[0]}"
        ):
            BliprenForConditionalGeneration.from_vision_text_pretrained(vision, llm, num_queries=4, qformer=QFORMER)


def test_image_processor_settings_and_normalised_patches(bases):
    folders = bases("vision", "mobilenet_v2"), bases("llm", "llama")
    options = {"size": {"height": 96, "width": 96}}
    model = BliprenForConditionalGeneration.from_vision_text_pretrained(
        *folders, num_queries=4, qformer={**QFORMER, "normalize_patches": True}, image_processor_options=options
    )
    processor = BliprenProcessor.from_vision_text_pretrained(*folders, num_queries=4, image_processor_options=options)
    pixels = processor(images=random_image(), return_tensors="pt")["pixel_values"]
    assert pixels.shape[-2:] == (96, 96) and model.config.vision_grid == [3, 3]
    patches = model.encode_images(pixels)
    first = model.get_image_features(patch_features=patches).pooler_output[0]
    scaled = model.get_image_features(patch_features=5 * patches).pooler_output[0]
    torch.testing.assert_close(first, scaled, rtol=1e-3, atol=1e-3)


def test_shift_labels_replace_labels(tiny):
    """The labels of the next token, as sequence parallelism passes them, give the loss of `labels`."""
    model, processor = tiny
    batch = supervised(processor, CAPTIONS, [random_image(i) for i in range(3)])
    labels = batch.pop("labels")
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    for options in ({}, {"label_logits_only": True}):
        assert torch.equal(
            model(**batch, shift_labels=shifted, **options).loss, model(**batch, labels=labels, **options).loss
        )


def test_vllm_gets_the_model_without_head(pair, tmp_path):
    """vLLM takes it from AutoModel, with attention of its own, and embeds placeholders (tests/with_vllm/prove.py runs it)."""
    model, processor = pair()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(AutoModel.from_config(config)) is BliprenForConditionalGeneration
    AttentionInterface.register("vllm", sdpa_attention_forward)
    try:
        config.text_config._attn_implementation = "vllm"
        engine_model = AutoModel.from_config(config).eval()
    finally:
        del AttentionInterface._global_mapping["vllm"]
    assert type(engine_model) is BliprenModel
    engine_model.load_state_dict(model.model.state_dict())
    ids = processor(images=random_image(), return_tensors="pt")["input_ids"]
    is_image = ids == model.config.image_token_id
    assert model.config.image_token_id >= model.config.text_config.vocab_size
    for part in (engine_model, engine_model.language_model):
        embedded = part.get_input_embeddings()(ids)
        assert torch.equal(embedded[~is_image], model.get_input_embeddings()(ids[~is_image]))
