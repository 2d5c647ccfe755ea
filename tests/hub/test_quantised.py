"""Quantised loading: the towers are quantised, the small trained connector and the head are not, whatever is asked for."""

import pytest
import torch
from tiny import picture, tiny_llm_config, write_llm, write_model, write_vision
from transformers import BitsAndBytesConfig

from blipren import BliprenForConditionalGeneration, BliprenProcessor

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # a block of 4-bit numbers is 64 wide
CONFIGS = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4, vision left out": {"load_in_4bit": True, "llm_int8_skip_modules": ["model.vision_tower"]},
}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantised")
    return write_model(
        root / "full", write_vision(root / "vision", **WIDE), write_llm(root / "llm", tiny_llm_config(**WIDE))
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_quantised_loading(name, full):
    inputs = BliprenProcessor.from_pretrained(full)(images=picture(), return_tensors="pt")
    quantization = BitsAndBytesConfig(**CONFIGS[name])
    asked_for = list(quantization.llm_int8_skip_modules or [])
    model = BliprenForConditionalGeneration.from_pretrained(full, quantization_config=quantization)
    assert list(quantization.llm_int8_skip_modules or []) == asked_for, "the caller's config was changed"
    assert "bitsandbytes" in type(model.model.language_model.layers[0].mlp.up_proj).__module__
    vision = type(model.model.vision_tower.encoder.layers[0].mlp.fc1)
    assert ("bitsandbytes" in vision.__module__) == ("vision" not in name)
    for module in (model.model.projector.fc1, model.model.qformer.layers[0].self_attention.query, model.lm_head):
        assert type(module) is torch.nn.Linear
    assert model.model.projector.fc1.weight.dtype == torch.float32
    with torch.no_grad():
        expected = BliprenForConditionalGeneration.from_pretrained(full)(**inputs).logits
        found = model(**inputs).logits.float()
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.8
    assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3
