"""Quantised loading, from bitsandbytes and torchao: the towers are quantised, the small trained connector and the head are not, whatever is asked for."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from tests.hub.tiny import picture, tiny_llm_config, write_llm, write_model, write_vision

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # a block of 4-bit numbers is 64 wide
CONNECTOR = ("model.qformer.", "model.projector.")
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
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
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


def test_torchao(full):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    inputs = BliprenProcessor.from_pretrained(full)(images=picture(), return_tensors="pt")
    model = BliprenForConditionalGeneration.from_pretrained(
        full, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    assert "Int8" in type(model.model.language_model.layers[0].mlp.up_proj.weight).__name__
    for module in (model.model.projector.fc1, model.model.qformer.layers[0].self_attention.query, model.lm_head):
        assert type(module.weight) is torch.nn.Parameter
    with torch.no_grad():
        expected = BliprenForConditionalGeneration.from_pretrained(full)(**inputs).logits
        found = model(**inputs).logits
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99


def test_what_a_quantised_model_saves(full, tmp_path):
    """A bridge of it is not quantised and holds the connector alone; a full checkpoint is, and loads to equal logits."""
    from peft import LoraConfig

    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    inputs = BliprenProcessor.from_pretrained(full)(images=picture(), return_tensors="pt")
    plain = BliprenForConditionalGeneration.from_pretrained(full)
    model = BliprenForConditionalGeneration.from_pretrained(
        full, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    model.save_bridge(tmp_path / "bridge")
    model.save_pretrained(tmp_path / "full")
    assert all(name.startswith(CONNECTOR) for name in load_file(tmp_path / "bridge" / "model.safetensors"))
    with torch.no_grad():
        bridge = BliprenForConditionalGeneration.from_pretrained(tmp_path / "bridge")
        assert torch.equal(bridge(**inputs).logits, plain(**inputs).logits)
        again = BliprenForConditionalGeneration.from_pretrained(tmp_path / "full")
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    model.add_adapter(LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)"))
    with pytest.raises(ValueError, match="use save_bridge"):
        model.save_pretrained(tmp_path / "lora-full")
    model.save_bridge(tmp_path / "lora")
    assert all(name.startswith(CONNECTOR) for name in load_file(tmp_path / "lora" / "model.safetensors"))
    assert (tmp_path / "lora" / "adapter" / "adapter_config.json").is_file()
    with torch.no_grad():  # the adapter is new, and so changes nothing
        assert torch.equal(
            BliprenForConditionalGeneration.from_pretrained(tmp_path / "lora")(**inputs).logits, plain(**inputs).logits
        )
