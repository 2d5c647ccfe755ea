"""Bridge <-> full, and models of the BLIP-2 family as ours: equal logits, or one clear refusal."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    BlipImageProcessorPil,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    OPTConfig,
    T5Config,
)

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.cli import main
from blipren.training.errors import UserError
from blipren.training.hub.convert import convert_checkpoint
from blipren.training.hub.import_blip2 import import_blip2
from tests.hub.tiny import picture, tiny_llm_config, tiny_tokenizer, write_llm, write_model, write_vision

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 8}
QFORMER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
QFORMER |= {"encoder_hidden_size": 32, "vocab_size": 320, "max_position_embeddings": 64}
OPT = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 32}
OPT |= {"vocab_size": 321, "max_position_embeddings": 128, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
IMAGE_TOKEN_ID = 320


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    root = tmp_path_factory.mktemp("convert")
    return write_model(root / "full", write_vision(root / "vision"), write_llm(root / "llm"))


def weights_of(folder) -> dict:
    return BliprenForConditionalGeneration.from_pretrained(folder).state_dict()


def test_full_to_bridge_and_back_on_the_command_line(full, tmp_path):
    assert main(["convert", str(full), str(tmp_path / "bridge"), "--to", "bridge"]) == 0
    assert main(["convert", str(tmp_path / "bridge"), str(tmp_path / "full"), "--to", "full"]) == 0
    first, bridge, last = (weights_of(folder) for folder in (full, tmp_path / "bridge", tmp_path / "full"))
    assert first.keys() == bridge.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) and torch.equal(first[name], bridge[name]) for name in first)
    small, large = ((tmp_path / kind / "model.safetensors").stat().st_size for kind in ("bridge", "full"))
    assert small < 0.6 * large
    assert (tmp_path / "full" / "model.safetensors").read_bytes() == (full / "model.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bridge", "full"]


def test_a_bridge_that_would_lose_trained_weights_is_refused(full, tmp_path, capsys):
    """The language model of this full checkpoint is no longer its base: nothing in the config says so."""
    tuned = tmp_path / "tuned"
    shutil.copytree(full, tuned)
    weights = load_file(tuned / "model.safetensors")
    weights["model.language_model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    assert main(["convert", str(tuned), str(tmp_path / "bridge"), "--to", "bridge"]) == 1
    assert "would be lost" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tuned"]


def test_lora_goes_along(full, tmp_path):
    """Adapters lie under adapter/ in both kinds of checkpoint, and the logits with them are equal."""
    from peft import LoraConfig

    model = BliprenForConditionalGeneration.from_pretrained(full)
    model.add_adapter(LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    processor = BliprenProcessor.from_pretrained(full)
    inputs = processor(images=picture(), return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits
        plain = BliprenForConditionalGeneration.from_pretrained(full)(**inputs).logits
    assert not torch.allclose(expected, plain, atol=1e-3)
    model.save_bridge(tmp_path / "bridge")
    processor.save_pretrained(tmp_path / "bridge")
    convert_checkpoint(tmp_path / "bridge", tmp_path / "full", "full")
    for kind in ("bridge", "full"):
        folder = tmp_path / kind
        assert (folder / "adapter" / "adapter_config.json").is_file() and not (folder / "adapter_config.json").exists()
        assert not [name for name in load_file(folder / "model.safetensors") if "lora" in name or "base_layer" in name]
        with torch.no_grad():
            found = BliprenForConditionalGeneration.from_pretrained(folder)(**inputs).logits
        assert torch.allclose(found, expected, atol=1e-5), kind


def write_donor(folder, kind, text_config):
    torch.manual_seed(0)
    config_class, model_class = {
        "blip2": (Blip2Config, Blip2ForConditionalGeneration),
        "instructblip": (InstructBlipConfig, InstructBlipForConditionalGeneration),
    }[kind]
    config = config_class(
        vision_config=VISION, qformer_config=QFORMER, text_config=text_config.to_dict(), num_query_tokens=4
    )
    config.image_token_id = IMAGE_TOKEN_ID
    model = model_class(config).eval()
    with torch.no_grad():  # fresh weights are so small that a wrong one would hardly show
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "language_model" not in name or name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    if kind == "instructblip":
        tiny_tokenizer().save_pretrained(folder / "qformer_tokenizer")
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["blip2", "instructblip"])
@pytest.mark.parametrize("llm", ["opt", "llama"])
def test_blip2_family_becomes_ours_with_equal_logits(kind, llm, tmp_path):
    text_config = OPTConfig(**OPT) if llm == "opt" else tiny_llm_config(vocab_size=321)
    donor = write_donor(tmp_path / "donor", kind, text_config)
    assert main(["import", str(tmp_path / "donor"), str(tmp_path / "ours")]) == 0
    model = BliprenForConditionalGeneration.from_pretrained(tmp_path / "ours")
    processor = BliprenProcessor.from_pretrained(tmp_path / "ours")
    inputs = processor(
        images=[picture(0), picture(1)], text=["a photo", "what is in the picture?"], return_tensors="pt"
    )
    assert (inputs["input_ids"] == IMAGE_TOKEN_ID).sum(dim=1).tolist() == [4, 4]
    # as BLIP-2 lays it out: padding, image, beginning of text, prompt
    row = inputs["input_ids"][1][inputs["attention_mask"][1].bool()].tolist()
    assert row[:5] == [IMAGE_TOKEN_ID] * 4 + [0] and row.count(0) == 1
    assert ("qformer_input_ids" in inputs) == (kind == "instructblip")
    with torch.no_grad():
        expected = donor(**inputs).logits
        found = model(**inputs).logits
    shown = inputs["attention_mask"].bool()
    assert (found - expected)[shown].abs().max() < 1e-4
    assert expected[shown].std() > 0.05
    tokens = model.generate(**inputs, max_new_tokens=5)
    assert torch.equal(tokens[:, inputs["input_ids"].shape[1] :], donor.generate(**inputs, max_new_tokens=5)[:, -5:])
    if kind == "instructblip":
        changed = dict(inputs, qformer_input_ids=inputs["qformer_input_ids"].flip(1))
        with torch.no_grad():
            assert (model(**changed).logits - found)[shown].abs().max() > 1e-3, "the Q-Former does not read its text"
        del changed["qformer_input_ids"]
        with pytest.raises(ValueError, match="needs qformer_input_ids"):
            model(**changed)


def test_what_cannot_be_imported_is_said(full, tmp_path):
    t5 = T5Config(d_model=32, d_ff=64, num_layers=1, num_heads=2, vocab_size=321, d_kv=16)
    write_donor(tmp_path / "t5", "blip2", t5)
    with pytest.raises(UserError, match=r"\(t5\) is an encoder-decoder"):
        import_blip2(str(tmp_path / "t5"))
    with pytest.raises(UserError, match="is a blipren model; import takes blip-2 and instructblip"):
        import_blip2(str(full))
    with pytest.raises(UserError, match="there is no model at"):
        import_blip2(str(tmp_path / "missing"))


def test_out_is_complete_or_absent(full, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    assert main(["convert", str(full), str(tmp_path / "there")]) == 1
    assert "is not an empty folder" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "none"), str(tmp_path / "out")]) == 1
    assert main(["import", str(full), str(tmp_path / "out")]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"]
