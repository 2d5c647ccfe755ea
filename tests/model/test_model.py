"""The model: pixels and patch features, labels, token counts, freezing, projectors, equality with BLIP-2."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import QFORMER, random_image
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from blipren import (
    BliprenConfig,
    BliprenForConditionalGeneration,
    BliprenModel,
    BliprenProcessor,
    BliprenQFormer,
    BliprenQFormerConfig,
)
from blipren.projector_blipren import BliprenMoeProjector
from blipren.qformer_weights_blipren import copy_bert_weights, copy_blip2_weights


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


def test_opt_projector_has_the_width_of_the_embeddings(pair):
    model, _ = pair(llm="opt")
    assert model.config.text_config.hidden_size == 32 and model.model.projector.fc2.out_features == 16


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
