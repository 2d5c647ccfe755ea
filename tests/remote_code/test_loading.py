"""Whoever has only the id: fresh processes without our package, by folder, by Hub id and revision, by every auto class."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers.utils import is_flash_attn_2_available

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.commands.push import PushSettings
from blipren.training.conversation.conversation import Conversation
from blipren.training.evaluation.generation import load_model
from blipren.training.hub.publish import publish
from tests.hub.fake_cache import lay_out_cache
from tests.hub.fresh import fresh_result, run_fresh
from tests.hub.tiny import TINY_QFORMER, write_llm, write_model

REPO = "user/blipren-tiny"


def answer(folder, photo, **options) -> dict:
    """Tokens and logits of this process, which the fresh ones must reproduce."""
    model = BliprenForConditionalGeneration.from_pretrained(folder, **options)
    inputs = BliprenProcessor.from_pretrained(folder)(images=Image.open(photo), return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    return {"tokens": model.generate(**inputs, max_new_tokens=6)[0].tolist(), "logits": logits.tolist()}


def digests(folder: Path, *but: str) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and "__pycache__" not in p.parts]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.name not in but}


LOAD = """
import torch, transformers
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers import pipeline
image = Image.open("photo.jpg")
def load(auto, **more):
    return auto.from_pretrained(WHERE, trust_remote_code=True, **OPTIONS, **more)
def answer(model):
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    return {"tokens": model.generate(**inputs, max_new_tokens=6)[0].tolist(), "logits": logits.tolist()}
config, processor = load(AutoConfig), load(AutoProcessor)
inputs = processor(images=image, return_tensors="pt")
"""


def test_every_auto_class_and_pipeline_from_a_folder(full, photo, tmp_path):
    code = (
        f"WHERE, OPTIONS = {str(full)!r}, {{}}"
        + LOAD
        + """
result = {"config": type(config).__name__, "answers": []}
for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = load(auto)
    result["answers"].append(answer(model))
result["class"] = [type(model).__name__, type(model).__module__.split(".")[0]]
masks = processor(images=[image, image], text=["a", "a longer text"], return_tensors="pt")["attention_mask"]
result["padding"] = [masks[0, [0, 1, -1]].tolist(), processor.tokenizer.padding_side]
result["places"] = processor.post_process_grounding("a dog [0, 500, 999, 999] [250, 250] [1]", (640, 480))
model.save_pretrained("again")
load(AutoProcessor).save_pretrained("again")

captioner = pipeline("image-to-text", model=WHERE, trust_remote_code=True, max_new_tokens=6)
rows = [{"image": image}, {"image": image, "text": "What is it?"}]
result["captions"] = {
    "image": captioner(image), "path": captioner("photo.jpg"), "list": captioner([image, "photo.jpg"]),
    "batches": captioner([image] * 3, batch_size=2), "generator": list(captioner(image for _ in range(2))),
    "rows": list(captioner(row for row in rows)), "prompt": captioner(image, prompt="What is it?"),
    "beams": captioner(image, generate_kwargs={"num_beams": 2}), "short": captioner(image, max_new_tokens=1),
}
captioner.save_pretrained("pipe")
named = pipeline("image-to-text", model="pipe", trust_remote_code=True, max_new_tokens=6)
result["captions"]["saved"] = named(image)
given = pipeline("image-to-text", model=model, processor=processor, pipeline_class=type(captioner), max_new_tokens=6)
result["captions"]["object"] = given(image)

chat = pipeline("image-text-to-text", model=WHERE, trust_remote_code=True)
message = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]}]
settings = {"max_new_tokens": 6, "return_full_text": False}
chat_object = pipeline("image-text-to-text", model=model, processor=processor)
result["chats"] = [
    chat(images=image, text="What is it?", **settings)[0]["generated_text"],
    chat(text=message, **settings)[0]["generated_text"],
    chat_object(text=message, **settings)[0]["generated_text"],
]
later = [{"type": "image", "image": image.rotate(90)}, {"type": "text", "text": "And here?"}]
first = {"role": "assistant", "content": [{"type": "text", "text": result["chats"][1].strip()}]}
result["later"] = chat(text=[*message, first, {"role": "user", "content": later}], **settings)[0]["generated_text"]
"""
    )
    (tmp_path / "photo.jpg").write_bytes(photo.read_bytes())
    got = fresh_result(code, tmp_path, {"HF_HOME": str(tmp_path / "home")})
    expected = answer(full, photo)
    assert got["config"] == "BliprenConfig"
    assert got["class"] == ["BliprenForConditionalGeneration", "transformers_modules"]
    for found in got["answers"]:
        assert found["tokens"] == expected["tokens"]
        assert found["logits"] == pytest.approx(expected["logits"], abs=1e-6)
    captions = got["captions"]
    one = captions["image"]
    assert isinstance(one[0]["generated_text"], str) and len(one) == 1 and list(one[0]) == ["generated_text"]
    assert captions["path"] == captions["saved"] == captions["object"] == one
    assert captions["list"] == [one] * 2 and captions["batches"] == [one] * 3 and captions["generator"] == [one] * 2
    assert captions["rows"] == [one, captions["prompt"]] and captions["prompt"] != one
    assert captions["beams"][0]["generated_text"]
    assert one[0]["generated_text"].startswith(captions["short"][0]["generated_text"].rstrip("\ufffd"))
    assert got["chats"][0].strip() == got["chats"][1].strip() == got["chats"][2].strip()
    assert got["chats"][0].strip() == captions["prompt"][0]["generated_text"]
    chat = Conversation(*load_model(str(full), "cpu"))
    with Image.open(photo) as image:
        asked = (("What is it?", image), ("And here?", image.rotate(90)))
        answers = [chat.ask(question, [picture], max_new_tokens=6) for question, picture in asked]
    assert answers == [got["chats"][0].strip(), got["later"].strip()]
    assert got["padding"] == [[0, 0, 1], "left"]
    assert got["places"]["boxes"] == [pytest.approx([0.32, 240.24, 639.68, 479.76])]
    assert [len(got["places"]["points"]), got["places"]["malformed"]] == [1, 1]
    # what remote code saves is what the package saved: code, weights, processor, byte for byte
    assert digests(tmp_path / "again") == digests(full)


def test_hub_id_and_revision_and_the_example_of_the_card(hub, full, bases, photo, tmp_path):
    """Pushed by `blipren push`, then fetched by id in a fresh process: v1 stays what it was when main moves on."""
    licenses = {"vision_license": "mit", "llm_license": "mit"}
    publish(PushSettings(model=str(full), repo=REPO, tag="v1", **licenses))
    other = write_model(tmp_path / "other", *bases, seed=5)
    publish(PushSettings(model=str(other), repo=REPO, tag="v2", **licenses))
    (tmp_path / "photo.jpg").write_bytes(photo.read_bytes())
    card = hub.repository(REPO).read("main", "README.md").decode()
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(blocks) == 2 and all(REPO in block for block in blocks)
    examples = "".join(
        f"with contextlib.redirect_stdout(io.StringIO()) as out:\n    exec({block!r}, {{}})\nshown.append(out.getvalue())\n"
        for block in blocks
    )
    code = (
        f"WHERE, OPTIONS = {REPO!r}, {{'revision': 'v1'}}"
        + LOAD
        + f"""
import contextlib, io
shown = []
result = {{"v1": answer(load(AutoModelForImageTextToText))}}
OPTIONS = {{}}
result["main"] = answer(load(AutoModel))
{examples}
result["shown"] = shown
"""
    )
    got = fresh_result(code, tmp_path, hub.environment(str(tmp_path / "home")))
    for revision, folder in (("v1", full), ("main", other)):
        expected = answer(folder, photo)
        assert got[revision]["tokens"] == expected["tokens"], revision
        assert got[revision]["logits"] == pytest.approx(expected["logits"], abs=1e-6)
    assert got["v1"]["logits"] != pytest.approx(got["main"]["logits"], abs=1e-3)
    assert got["shown"][0].startswith("[{'generated_text':") and got["shown"][1].strip()


def test_installed_needs_no_remote_code(full, photo):
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )

    from blipren import BliprenImageToTextPipeline

    assert AutoConfig.from_pretrained(full).model_type == "blipren"
    for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        assert type(auto.from_pretrained(full)) is BliprenForConditionalGeneration
    processor = AutoProcessor.from_pretrained(full)
    assert type(processor) is BliprenProcessor
    model = AutoModel.from_pretrained(full)
    given = BliprenImageToTextPipeline(model=model, processor=processor)
    assert given(str(photo), max_new_tokens=2)[0].keys() == {"generated_text"}


def test_save_load_save_gives_the_same_files(full, tmp_path):
    model, processor = BliprenForConditionalGeneration.from_pretrained(full), BliprenProcessor.from_pretrained(full)
    model.save_pretrained(tmp_path / "second")
    processor.save_pretrained(tmp_path / "second")
    assert digests(tmp_path / "second") == digests(full)
    BliprenForConditionalGeneration.from_pretrained(tmp_path / "second").save_bridge(tmp_path / "bridge")
    bridge = BliprenForConditionalGeneration.from_pretrained(tmp_path / "bridge")
    bridge.save_bridge(tmp_path / "bridge2")
    assert digests(tmp_path / "bridge") == digests(tmp_path / "bridge2")
    bridge.save_pretrained(tmp_path / "third")
    processor.save_pretrained(tmp_path / "third")
    assert digests(tmp_path / "third") == digests(full)
    shards = tmp_path / "shards"
    model.save_pretrained(shards, max_shard_size="60KB")
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    loaded = BliprenForConditionalGeneration.from_pretrained(shards).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_bridge_over_hub_bases_in_a_fresh_process(bases, photo, tmp_path):
    """A bridge names its bases by id and commit; both come from the (fake) cache of whoever loads it."""
    home, cache = tmp_path / "home", {"cache_dir": str(tmp_path / "home" / "hub")}
    commits = {name: lay_out_cache(home, f"org/{name}", folder) for name, folder in zip(("vision", "llm"), bases)}
    model = BliprenForConditionalGeneration.from_vision_text_pretrained(
        "org/vision", "org/llm", num_queries=4, qformer=TINY_QFORMER, **cache
    )
    assert {part: (base["id"], base["revision"]) for part, base in model.config.base_models.items()} == {
        part: (f"org/{part}", commit) for part, commit in commits.items()
    }
    processor = BliprenProcessor.from_vision_text_pretrained("org/vision", "org/llm", num_queries=4, **cache)
    model.save_bridge(tmp_path / "bridge")
    model.save_pretrained(tmp_path / "full")
    for folder in ("bridge", "full"):
        processor.save_pretrained(tmp_path / folder)
    sizes = {kind: (tmp_path / kind / "model.safetensors").stat().st_size for kind in ("bridge", "full")}
    assert sizes["bridge"] < 0.6 * sizes["full"]
    # the same id moves on to other weights: the pinned commit does not
    moved = lay_out_cache(home, "org/llm", write_llm(tmp_path / "other-llm", seed=9))
    (tmp_path / "photo.jpg").write_bytes(photo.read_bytes())
    code = f"WHERE, OPTIONS = 'bridge', {{}}{LOAD}result = answer(load(AutoModelForImageTextToText))\n"
    got = fresh_result(code, tmp_path, {"HF_HOME": str(home)})
    expected = answer(tmp_path / "full", photo)
    assert got["tokens"] == expected["tokens"]
    assert got["logits"] == pytest.approx(expected["logits"], abs=1e-6)
    # a bridge over another revision: one that holds other weights, one that is not there
    for revision, message in ((moved, "whose weights differ"), ("f" * 40, "f, which cannot be found")):
        raw = json.loads((tmp_path / "bridge" / "config.json").read_text())
        raw["base_models"]["llm"]["revision"] = revision
        (tmp_path / "bridge" / "config.json").write_text(json.dumps(raw))
        with pytest.raises(ValueError, match=message):
            BliprenForConditionalGeneration.from_pretrained(tmp_path / "bridge", **cache)


def test_options_of_from_pretrained(full, photo):
    expected = answer(full, photo)
    low = answer(full, photo, dtype=torch.bfloat16)
    assert low["logits"] == pytest.approx(expected["logits"], abs=0.1)
    model = BliprenForConditionalGeneration.from_pretrained(full, dtype=torch.bfloat16)
    assert model.model.language_model.dtype == torch.bfloat16
    assert model.model.projector.fc1.weight.dtype == torch.float32
    for options in ({"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}):
        assert answer(full, photo, **options)["logits"] == pytest.approx(expected["logits"], abs=1e-6), options
    for attention in ("eager", "sdpa", "flex_attention"):
        found = answer(full, photo, attn_implementation=attention)
        assert found["logits"] == pytest.approx(expected["logits"], abs=1e-4), attention
        model = BliprenForConditionalGeneration.from_pretrained(full, attn_implementation=attention)
        assert model.model.language_model.config._attn_implementation == attention
        assert model.model.vision_tower.config._attn_implementation == attention
    if not is_flash_attn_2_available():
        with pytest.raises(ImportError, match="FlashAttention2"):
            BliprenForConditionalGeneration.from_pretrained(full, attn_implementation="flash_attention_2")


@pytest.mark.parametrize("kind", ["full", "bridge"])
@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "lora"])
def test_offloaded_to_disk_the_logits_are_the_same(full, photo, tmp_path, kind, adapter):
    """With LoRA too: adapters of offloaded layers stay in memory, where nothing fetches them from disk."""
    from peft import LoraConfig

    model = BliprenForConditionalGeneration.from_pretrained(full)
    if adapter:
        model.add_adapter(LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    folder = tmp_path / "model"
    model.save_pretrained(folder) if kind == "full" else model.save_bridge(folder)
    BliprenProcessor.from_pretrained(full).save_pretrained(folder)
    expected = answer(folder, photo)
    assert (expected["logits"] == pytest.approx(answer(full, photo)["logits"], abs=1e-3)) is not adapter
    parts = {"model.vision_tower": "disk", "model.qformer": "cpu", "model.projector": "cpu", "lm_head": "cpu"}
    for options in (
        {"device_map": parts | {"model.language_model": "disk"}},
        {"device_map": "auto", "max_memory": {"cpu": 60_000}},
    ):
        found = answer(folder, photo, offload_folder=tmp_path / "offload", **options)
        assert found["tokens"] == expected["tokens"]
        assert found["logits"] == pytest.approx(expected["logits"], abs=1e-6), options


def test_remote_code_is_not_run_unasked(full, tmp_path):
    process = run_fresh(
        f"from transformers import AutoConfig\nAutoConfig.from_pretrained({str(full)!r}, trust_remote_code=False)",
        tmp_path,
        {"HF_HOME": str(tmp_path / "home")},
    )
    assert process.returncode != 0 and "trust_remote_code=True" in process.stderr
