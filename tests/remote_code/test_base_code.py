"""Base models that bring code of their own: refused unless the person who runs the process names it with its commit.

Every case runs in a process of its own: what a process has registered it keeps.
"""

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from safetensors.torch import save_file
from transformers import ViTConfig, ViTModel

from tests.hub.fresh import fresh_result, run_fresh
from tests.hub.loopback.server import TOKEN
from tests.hub.tiny import TINY_QFORMER, write_llm, write_vision

CONFIG = """
from transformers import {base}Config

class MysteryConfig({base}Config):
    model_type = "mystery_{part}"
"""
MODEL = """
import os
from transformers import {bases}
from .configuration_mystery import MysteryConfig

if "RAN" in os.environ:
    open(os.environ["RAN"], "a").write("{part}\\n")
"""
MODEL_CLASS = """
class Mystery{base}({base}):
    config_class = MysteryConfig
"""
LLM, VISION = "them/mystery-lm", "them/mystery-vit"


def publish(hub, folder: Path, repo: str, part: str, base: str, classes: dict[str, str]) -> str:
    """Pushes a base model with code of its own; returns the commit."""
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = f"mystery_{part}"
    config["auto_map"] = {"AutoConfig": "configuration_mystery.MysteryConfig"}
    config["auto_map"] |= {auto: f"modeling_mystery.Mystery{model}" for auto, model in classes.items()}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_mystery.py").write_text(CONFIG.format(base=base, part=part))
    code = MODEL.format(bases=", ".join(classes.values()), part=part)
    code += "".join(MODEL_CLASS.format(base=name) for name in classes.values())
    (folder / "modeling_mystery.py").write_text(code)
    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo(repo, exist_ok=True)
    return api.upload_folder(repo_id=repo, folder_path=folder).oid


@pytest.fixture
def bases(hub, tmp_path):
    """A loopback Hub with a language model and a vision encoder of unknown architecture: the server and their pins."""
    folder = tmp_path / "mystery"
    llm_classes = {"AutoModel": "LlamaModel", "AutoModelForCausalLM": "LlamaForCausalLM"}
    vision = write_vision(folder / "vision")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes), add_pooling_layer=False)
    model.save_pretrained(vision)
    # save_pretrained keeps to the names of the published ViT, which only transformers' own model type is read by
    save_file(model.state_dict(), vision / "model.safetensors", {"format": "pt"})
    llm_commit = publish(hub, write_llm(folder / "llm"), LLM, "lm", "Llama", llm_classes)
    vision_commit = publish(hub, vision, VISION, "vit", "ViT", {"AutoModel": "ViTModel"})
    return hub, f"{LLM}@{llm_commit}", f"{VISION}@{vision_commit}"


MAKE = """
import sys
from blipren.training.cli import main
sys.exit(main(["new", "made", "--vision", {vision!r}, "--llm", {llm!r}, "--queries", "4", "--qformer", {qformer!r}]))
"""
LOAD = """
import torch
from transformers import AutoModel
result = []
for folder in ("full", "bridge"):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    inputs = dict(input_ids=torch.tensor([[5] + [model.config.image_token_id] * 4 + [6, 7]]))
    inputs["pixel_values"] = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    result += [type(part).__name__ for part in (model.model.language_model, model.model.vision_tower)]
    result.append(model(**inputs).logits.sum().item())
"""


def make(vision: str | Path, llm: str | Path, folder: Path, environment: dict):
    """`blipren new` in a process of its own."""
    code = MAKE.format(vision=str(vision), llm=str(llm), qformer=json.dumps(TINY_QFORMER))
    return run_fresh(code, folder, environment, installed=True)


def test_they_are_refused_unless_named_with_their_commit(bases, tmp_path):
    hub, llm, vision = bases
    environment = hub.environment(str(tmp_path / "home")) | {"RAN": str(tmp_path / "ran")}
    other_commit = {"BLIPREN_TRUST_BASE_CODE": f"{vision} {LLM}@{'0' * 40} {LLM}"}
    for trust, names in (({}, vision), (other_commit, llm)):
        process = make(VISION, LLM, tmp_path, environment | trust)
        assert f'set BLIPREN_TRUST_BASE_CODE="{names}"' in process.stderr
        assert "Traceback" not in process.stderr and not (tmp_path / "made").exists()
    # the language model's code was never imported
    assert "lm" not in (tmp_path / "ran").read_text().split()


def test_named_with_their_commits_they_are_joined_trained_saved_and_loaded(bases, tmp_path):
    hub, llm, vision = bases
    named = {"BLIPREN_TRUST_BASE_CODE": f"{llm} {vision}"}
    environment = hub.environment(str(tmp_path / "home"))
    process = make(VISION, LLM, tmp_path, environment | named)
    assert process.returncode == 0, process.stderr
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert [config["base_models"][part]["revision"] for part in ("llm", "vision")] == [
        pin.split("@")[1] for pin in (llm, vision)
    ]
    train = """
import torch
from blipren import BliprenForConditionalGeneration
model = BliprenForConditionalGeneration.from_pretrained("made").train()
ids = torch.tensor([[5] + [model.config.image_token_id] * 4 + [6, 7]])
pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
model(input_ids=ids, pixel_values=pixels, labels=ids.where(ids == 7, -100)).loss.backward()
optimizer.step()
tokens = model.eval().generate(input_ids=ids, pixel_values=pixels, max_new_tokens=3)
model.save_pretrained("full")
model.save_bridge("bridge")
assert tokens.shape[1] > ids.shape[1]
result = model(input_ids=ids, pixel_values=pixels).logits.sum().item()
"""
    logits = fresh_result(train, tmp_path, environment | named, installed=True)
    for installed in (True, False):
        found = fresh_result(LOAD, tmp_path, environment | named, installed=installed)
        assert found[:2] == found[3:5] == ["MysteryLlamaModel", "MysteryViTModel"]
        assert [found[2], found[5]] == pytest.approx([logits] * 2, rel=1e-5)
    # a checkpoint cannot speak for the person who loads it
    process = run_fresh(LOAD, tmp_path, environment)
    assert process.returncode != 0 and "BLIPREN_TRUST_BASE_CODE" in process.stderr


def test_a_folder_with_code_has_no_commit_to_name(tmp_path):
    llm = write_llm(tmp_path / "mystery")
    config = json.loads((llm / "config.json").read_text())
    config |= {
        "model_type": "mystery",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (llm / "config.json").write_text(json.dumps(config))
    (llm / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    vision = write_vision(tmp_path / "vision")
    process = make(vision, llm, tmp_path, {})
    assert "AutoConfig.register" in process.stderr and "Traceback" not in process.stderr
    assert not (tmp_path / "ran").exists() and not (tmp_path / "made").exists()
