"""Memory and reranker are published with their model: in a fresh process without our package it gives the same captions."""

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.commands.push import PushSettings
from blipren.training.hub.publish import publish
from tests.hub.fresh import fresh_result
from tests.memory.tools import random_memory
from tests.remote_code.test_loading import LOAD
from tests.reranker.tools import random_reranker

REPO = "user/blipren-remembers"


def test_published_with_the_model_and_exchanged(hub, full, photo, tmp_path):
    from PIL import Image

    model, processor = BliprenForConditionalGeneration.from_pretrained(full), BliprenProcessor.from_pretrained(full)
    inputs = processor(images=Image.open(photo), return_tensors="pt")
    model.reranker, expected = random_reranker(model, processor, 0), {}
    for name, seed in (("model", 0), ("other", 1)):
        model.memory = random_memory(model, processor, seed)
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        expected[name] = model.generate(**inputs, max_new_tokens=16)[0].tolist()
    alone = {"use_memory": False, "use_reranker": False}
    expected["reranked"] = model.generate(**inputs, max_new_tokens=16, use_memory=False)[0].tolist()
    expected["none"] = model.generate(**inputs, max_new_tokens=16, **alone)[0].tolist()
    shown = model.find_neighbours(2, pixel_values=inputs["pixel_values"])[0]
    licenses = {"vision_license": "mit", "llm_license": "mit"}
    publish(PushSettings(model=str(tmp_path / "model"), repo=REPO, **licenses))
    files = hub.repository(REPO).files("main")
    assert {"memory/memory.json", "memory/embeddings.safetensors", "memory/texts.arrow"} <= set(files)
    assert {"reranker/reranker.json", "reranker/reranker.safetensors"} <= set(files)
    publish(PushSettings(model=str(tmp_path / "other"), repo=f"{REPO}-2", **licenses))
    (tmp_path / "photo.jpg").write_bytes(photo.read_bytes())
    code = (
        f"WHERE, OPTIONS = {REPO!r}, {{}}"
        + LOAD
        + f"""
model = load(AutoModelForImageTextToText)
def tokens(**options):
    return model.generate(**inputs, max_new_tokens=16, **options)[0].tolist()
result = {{"model": tokens(), "none": tokens(**{alone}), "reranked": tokens(use_memory=False)}}
given = pipeline("image-to-text", model=WHERE, trust_remote_code=True)
result["pipeline"] = [given("photo.jpg", max_new_tokens=16, generate_kwargs=o)[0]["generated_text"] for o in ({{}}, {alone})]
result["texts"] = [processor.decode_answer(result[name][inputs["input_ids"].shape[1]:]) for name in ("model", "none")]
model.load_memory({REPO + "-2"!r})
result["other"] = tokens()
result["shown"] = model.find_neighbours(2, pixel_values=inputs["pixel_values"])[0]
"""
    )
    got = fresh_result(code, tmp_path, hub.environment(str(tmp_path / "home")))
    for name, tokens in expected.items():
        assert got[name] == tokens, name
    assert len({tuple(expected[name]) for name in ("model", "none", "reranked")}) == 3
    assert got["pipeline"] == got["texts"]
    assert [one["captions"] for one in got["shown"]] == [one["captions"] for one in shown]
