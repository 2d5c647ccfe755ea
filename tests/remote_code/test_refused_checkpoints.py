"""What is no checkpoint, or a damaged one, is said in one line."""

import json
import re
from pathlib import Path

import pytest
import torch

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from tests.hub.fresh import fresh_result
from tests.hub.tiny import tiny_llm_config, write_llm


def test_weights_that_are_missing_or_too_many_are_named(full, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    weights = load_file(full / "model.safetensors")
    for change, message in (
        (lambda w: w.pop("model.qformer.query_tokens"), "missing weights.*model.qformer.query_tokens"),
        (lambda w: w.pop("model.language_model.layers.1.mlp.up_proj.weight"), "missing.*layers.1.mlp.up_proj"),
        (lambda w: w.update({"model.qformer.extra": torch.zeros(2)}), "unexpected.*model.qformer.extra"),
        (lambda w: w.update({"model.qformer.query_tokens": torch.zeros(1, 9, 32)}), "model.qformer.query_tokens"),
    ):
        folder = tmp_path / "damaged"
        shutil.copytree(full, folder, dirs_exist_ok=True)
        changed = dict(weights)
        change(changed)
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises((ValueError, RuntimeError), match=message):
            BliprenForConditionalGeneration.from_pretrained(folder)


def test_what_is_no_checkpoint_is_said_in_one_line(full, bases, photo, tmp_path):
    """Truncated and tampered files, other models, futures and halves: one clear error each, in a fresh process."""
    import shutil

    from safetensors.torch import load_file, save_file

    model = BliprenForConditionalGeneration.from_pretrained(full)

    def copy(name: str, bridge: bool = False) -> Path:
        folder = tmp_path / name
        shutil.copytree(full, folder)
        if bridge:
            (folder / "model.safetensors").unlink()
            model.save_bridge(folder)
        return folder

    def edit(folder: Path, **values) -> None:
        config = json.loads((folder / "config.json").read_text())
        for key, value in values.items():
            config[key] = value(config[key]) if callable(value) else value
        (folder / "config.json").write_text(json.dumps(config))

    truncated = copy("truncated")
    content = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(content[: len(content) // 2])
    no_code = copy("no_code")
    for file in no_code.glob("*.py"):
        file.unlink()
    other_base = copy("other_base", bridge=True)
    edit(other_base, base_models=lambda b: b | {"llm": b["llm"] | {"id": str(write_llm(tmp_path / "llm2", seed=3))}})
    no_base = copy("no_base", bridge=True)
    edit(no_base, base_models=lambda b: b | {"llm": b["llm"] | {"id": str(tmp_path / "gone")}})
    wide_base = copy("wide_base", bridge=True)
    wide = write_llm(tmp_path / "wide", tiny_llm_config(hidden_size=64))
    edit(wide_base, base_models=lambda b: b | {"llm": b["llm"] | {"id": str(wide)}})
    tampered = copy("tampered", bridge=True)
    llm = tmp_path / "tampered-llm"
    shutil.copytree(bases[1], llm)
    weights = load_file(llm / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, llm / "model.safetensors", metadata={"format": "pt"})
    edit(tampered, base_models=lambda b: b | {"llm": b["llm"] | {"id": str(llm)}})
    future = copy("future")
    edit(future, projector="hologram")
    later = copy("later")
    edit(later, format_version=2)
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = {
        truncated: "truncated|incomplete|[Ii]nvalid|deserializ",
        no_code: "configuration_blipren.py",
        other_base: "whose weights differ",
        wide_base: "whose weights differ",
        tampered: "whose weights differ",
        no_base: "which cannot be found",
        future: "projector is 'hologram'",
        later: "has format 2, and this BLIPren reads",
        empty: "config.json",
        bases[1]: "not a BLIPren|BliprenForConditionalGeneration|Unrecognized|model_type",
    }
    code = f"""
from transformers import AutoModelForImageTextToText
result = {{}}
for where in {[str(folder) for folder in cases]!r}:
    try:
        AutoModelForImageTextToText.from_pretrained(where, trust_remote_code=True)
        result[where] = "LOADED"
    except Exception as error:
        result[where] = type(error).__name__ + ": " + str(error)
"""
    got = fresh_result(code, tmp_path, {"HF_HOME": str(tmp_path / "home")})
    for folder, message in cases.items():
        assert re.search(message, got[str(folder)]), (folder.name, got[str(folder)])


def test_a_processor_of_another_checkpoint_is_an_error(full, bases, photo, tmp_path):
    """Its placeholders or their number do not fit the model: an error that says the numbers, never a wrong caption."""
    from PIL import Image

    model = BliprenForConditionalGeneration.from_pretrained(full)
    other = BliprenProcessor.from_vision_text_pretrained(*bases, num_queries=7)
    inputs = other(images=Image.open(photo), return_tensors="pt")
    with pytest.raises(ValueError, match="tokens: 7, features: 4"):
        model(**inputs)
