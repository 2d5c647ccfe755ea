"""BliprenForImageTextRetrieval: BLIP-2's scores, both kinds of checkpoint, the way to the next stage and back."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer, Blip2Config, Blip2ForImageTextRetrieval

from blipren import BliprenConfig, BliprenForConditionalGeneration, BliprenForImageTextRetrieval
from blipren.configuration_blipren import HEADS
from blipren.training.objectives.contrast import similarity
from tests.tiny_models import QFORMER, random_image


@pytest.fixture(scope="module")
def tokenizer(bases):
    return AutoTokenizer.from_pretrained(bases["tokenizer"])


@pytest.fixture(scope="module")
def model(untrained, tokenizer):
    torch.manual_seed(1)
    generator = BliprenForConditionalGeneration.from_pretrained(untrained)
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "decoder_start_token_id": 1}
    model = BliprenForImageTextRetrieval.from_generator(generator, text, image_text_hidden_size=16).eval()
    assert model.config.trained_heads == []
    model.config.trained_heads = list(HEADS)
    return model


@pytest.fixture(scope="module")
def inputs(tokenizer):
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    tokens = tokenizer(["a red circle", "the blue star above two dogs", "dogs run"], padding=True, return_tensors="pt")
    return {"pixel_values": pixels, "input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def outputs(model, inputs):
    with torch.no_grad():
        return {objective: model(**inputs, objective=objective) for objective in ("itc", "itm", "itg")}


def assert_same(first, second):
    for objective, output in first.items():
        for name, tensor in output.items():
            assert torch.equal(tensor, second[objective][name]), (objective, name)


@pytest.fixture(scope="module")
def blip2_folder(tmp_path_factory):
    """A random BLIP-2 retrieval model of the published layout, larger weights than at initialisation."""
    small = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={**small, "image_size": 28, "patch_size": 14},
        qformer_config={
            **{**small, "hidden_size": 32},
            "encoder_hidden_size": 24,
            "vocab_size": 50,
            "max_position_embeddings": 16,
            "use_qformer_text_input": True,
        },
        text_config={"model_type": "opt", "hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 16, "vocab_size": 50,
                     "num_attention_heads": 2, "word_embed_proj_dim": 16},
        num_query_tokens=5,
        image_text_hidden_size=12,
    )  # fmt: skip
    torch.manual_seed(3)
    source = Blip2ForImageTextRetrieval(config)
    for name, parameter in source.named_parameters():
        mean = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        torch.nn.init.normal_(parameter, mean, 0.3)
    folder = tmp_path_factory.mktemp("blip2")
    source.save_pretrained(folder)
    return folder


def test_blip2_scores(blip2_folder, tmp_path):
    source = Blip2ForImageTextRetrieval.from_pretrained(blip2_folder).eval()
    assert source.config.image_token_index is None
    model = BliprenForImageTextRetrieval.from_blip2(source)
    model.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randn(3, 3, 28, 28, generator=generator)
    ids = torch.randint(1, 50, (3, 7), generator=generator)
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 2 + [0] * 5])
    for ours in (model, BliprenForImageTextRetrieval.from_pretrained(tmp_path).eval()):
        with torch.no_grad():
            contrast = source(pixel_values=pixels, input_ids=ids, attention_mask=mask)
            matching = source(
                pixel_values=pixels, input_ids=ids, attention_mask=mask, use_image_text_matching_head=True
            )
            found = ours(pixel_values=pixels, input_ids=ids, attention_mask=mask)
            matched = ours(pixel_values=pixels, input_ids=ids, attention_mask=mask, objective="itm").logits
        assert contrast.logits_per_image.std() > 0.05
        assert torch.allclose(found.logits_per_image, contrast.logits_per_image, atol=1e-4)
        assert torch.allclose(found.logits_per_text, contrast.logits_per_text, atol=1e-4)
        assert matching.logits_per_image.std() > 0.05
        assert torch.allclose(matched, matching.logits_per_image, atol=1e-4)


def test_both_checkpoints_reload_exactly(model, inputs, tmp_path):
    before = outputs(model, inputs)
    for kind, save in (("full", model.save_pretrained), ("bridge", model.save_bridge)):
        save(tmp_path / kind)
        reloaded = BliprenForImageTextRetrieval.from_pretrained(tmp_path / kind).eval()
        assert_same(before, outputs(reloaded, inputs))
        with safe_open(tmp_path / kind / "model.safetensors", "pt") as file:
            assert any(key.startswith("model.vision_tower.") for key in file.keys()) == (kind == "full")
        config = json.loads((tmp_path / kind / "config.json").read_text())
        assert config["architectures"] == ["BliprenForImageTextRetrieval"]
        assert config["base_models"]["llm"]["id"] == model.config.base_models["llm"]["id"]
        assert config["text_config"]["model_type"] == "llama"
        assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoProcessor"}
        assert "custom_pipelines" not in config


REMOTE = """
import sys, torch
from transformers import AutoConfig, AutoModel
folder = sys.argv[1]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
assert "blipren" not in sys.modules, "the folder's own code was to be run"
inputs = torch.load(folder + "/inputs.pt")
with torch.no_grad():
    torch.save({o: dict(model(**inputs, objective=o)) for o in ("itc", "itm", "itg")}, folder + "/outputs.pt")
print(type(model).__name__, type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__)
"""


def test_the_auto_class_by_the_checkpoints_own_code(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    torch.save(inputs, tmp_path / "inputs.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", REMOTE, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["BliprenForImageTextRetrieval", "BliprenConfig"]
    assert_same(outputs(model, inputs), torch.load(tmp_path / "outputs.pt"))


def test_the_auto_class_by_the_package(model, inputs, tmp_path):
    model.save_bridge(tmp_path)
    auto = AutoModel.from_pretrained(tmp_path).eval()
    assert type(auto) is BliprenForImageTextRetrieval
    assert_same(outputs(model, inputs), outputs(auto, inputs))


@pytest.mark.parametrize("kind", ["full", "bridge"])
def test_the_qformer_goes_on_into_generation(model, inputs, untrained, tmp_path, kind):
    """Same image features, the untouched projector of the model that stage 1 began with, the same LLM."""
    (model.save_pretrained if kind == "full" else model.save_bridge)(tmp_path)
    generator = BliprenForConditionalGeneration.from_pretrained(tmp_path).eval()
    begun = BliprenForConditionalGeneration.from_pretrained(untrained).eval()
    with torch.no_grad():
        patches = model.encode_images(inputs["pixel_values"])
        states = model.model.qformer(patches).query_states
        features = generator.get_image_features(inputs["pixel_values"])
        assert torch.equal(features.last_hidden_state, patches)
        assert torch.equal(torch.stack(features.pooler_output), begun.model.projector(states))
        ids = torch.arange(5)[None]
        assert torch.equal(generator(input_ids=ids).logits, begun(input_ids=ids).logits)
    generator.save_bridge(tmp_path / "next")
    again = BliprenForConditionalGeneration.from_pretrained(tmp_path / "next").eval()
    with torch.no_grad():
        assert torch.equal(torch.stack(again.get_image_features(inputs["pixel_values"]).pooler_output),
                           torch.stack(features.pooler_output))  # fmt: skip


def test_embeddings_have_length_one_and_give_the_scores(model, inputs):
    image = model.get_image_embeddings(inputs["pixel_values"])
    text = model.get_text_embeddings(inputs["input_ids"], inputs["attention_mask"])
    assert image.shape == (3, 4, 16)
    assert text.shape == (3, 16)
    assert torch.allclose(image.norm(dim=-1), torch.ones(3, 4))
    assert torch.allclose(text.norm(dim=-1), torch.ones(3))
    scores = model(**inputs).logits_per_image
    assert torch.allclose(scores, similarity(image, text, "max"), atol=1e-6)
    model.config.itc_pooling = "mean"
    try:
        assert torch.allclose(model.similarity(image, text), similarity(image, text, "mean"), atol=1e-6)
    finally:
        model.config.itc_pooling = "max"


def test_pixels_and_patch_features_meet(model, inputs):
    patches = {"patch_features": model.encode_images(inputs["pixel_values"])}
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert_same(outputs(model, inputs), outputs(model, {**patches, **text}))
    with pytest.raises(ValueError, match="pixel_values or patch_features, one of them"):
        model(**inputs, **patches)


def test_generation_logits_at_masked_positions_only(model, inputs):
    mask = inputs["attention_mask"].bool()
    whole = model(**inputs, objective="itg").logits
    assert torch.allclose(model(**inputs, objective="itg", logits_mask=mask).logits, whole[mask], atol=1e-6)
    with pytest.raises(ValueError, match="objective is 'itx'"):
        model(**inputs, objective="itx")


def test_generation_begins_with_its_own_token(model, inputs):
    """[CLS] never reaches the text of generation: another first token changes nothing."""
    other = inputs["input_ids"].clone()
    other[:, 0] = 7
    changed = outputs(model, {**inputs, "input_ids": other})
    before = outputs(model, inputs)
    assert torch.equal(changed["itg"].logits, before["itg"].logits)
    assert not torch.equal(changed["itc"].text_embeds, before["itc"].text_embeds)


def test_what_is_trained(model):
    trained = {name.split(".")[0] if "." in name else name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"model", "vision_proj", "text_proj", "itm_head", "text_head", "logit_scale", "logit_bias"}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert all(name.startswith(("model.vision_tower.", "model.projector.")) for name in frozen)
    assert "vision" in model.describe_trainable()
    model.train()
    assert not model.model.vision_tower.training
    model.eval()


def test_a_connector_without_qformer_is_refused(bases):
    patches = BliprenForConditionalGeneration.from_vision_text_pretrained(
        bases["vision"], bases["llm"], connector="patches", projector="linear"
    )
    with pytest.raises(ValueError, match="connector of this model is 'patches'"):
        BliprenForImageTextRetrieval.from_generator(patches)
    with pytest.raises(ValueError, match="text side"):
        BliprenForImageTextRetrieval(patches.config)


def test_image_sizes_of_the_processor_fit(model, bases):
    from transformers import AutoImageProcessor

    pixels = AutoImageProcessor.from_pretrained(bases["vision"])(random_image(), return_tensors="pt")["pixel_values"]
    assert model.get_image_embeddings(pixels).shape == (1, 4, 16)


def test_what_is_trained_stays_in_float32(bases, tokenizer, inputs, tmp_path):
    """Frozen parts in half precision; the rest begins, is saved and comes back in float32."""
    generator = BliprenForConditionalGeneration.from_vision_text_pretrained(
        bases["vision"], bases["llm"], num_queries=4, qformer=QFORMER, dtype=torch.float16
    )
    model = BliprenForImageTextRetrieval.from_generator(generator, {"vocab_size": len(tokenizer)}, 16)
    model.save_bridge(tmp_path)
    for each in (model, BliprenForImageTextRetrieval.from_pretrained(tmp_path)):
        assert {p.dtype for p in each.parameters() if p.requires_grad} == {torch.float32}
        assert each.model.vision_tower.dtype == torch.float16
        assert each.logit_scale.dtype == torch.float32
    model.config.trained_heads = ["matching"]
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float()(**inputs, objective="itm").logits.dtype == torch.bfloat16


@pytest.mark.parametrize("objective, head", zip(("itc", "itm", "itg"), HEADS))
def test_a_head_that_was_never_trained_is_refused(objective, head, model, inputs, tmp_path):
    others = [name for name in HEADS if name != head]
    model.config.trained_heads = others
    try:
        model.save_pretrained(tmp_path)
    finally:
        model.config.trained_heads = list(HEADS)
    reloaded = BliprenForImageTextRetrieval.from_pretrained(tmp_path).eval()
    assert reloaded.config.trained_heads == others
    with pytest.raises(ValueError, match=f"the {head} head of this model was never trained.*--{objective}-weight 1"):
        reloaded(**inputs, objective=objective)
    reloaded.config.check_trained_heads(*others)
    assert torch.isfinite(reloaded.train()(**inputs, objective=objective)[0]).all()  # training may use it
    reloaded.eval().config.trained_heads = None  # unknown, in older checkpoints
    assert torch.isfinite(reloaded(**inputs, objective=objective)[0]).all()


def test_trained_heads_are_names_of_heads():
    with pytest.raises(
        ValueError, match="trained_heads has 'itm'; the heads are 'contrast', 'matching', 'generation'"
    ):
        BliprenConfig(trained_heads=["itm"])
