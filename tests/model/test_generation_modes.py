"""The same tokens by every way of generating: growing cache, static cache, full-graph compiled, left-padded, beams."""

import pytest
import torch
from tiny_models import LLM_FAMILIES, random_image

QUICK = ("llama", "opt")  # rotary and learned positions; the others on request
PROMPTS = ["Short caption:", "What colour is the small ball in the picture ?"]


@pytest.mark.parametrize(
    "family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in LLM_FAMILIES]
)
def test_equal_tokens_by_every_way_of_generating(family, pair):
    model, processor = pair(llm=family)
    batch = processor(images=[random_image(0), random_image(1)], text=PROMPTS, return_tensors="pt")
    assert not batch["attention_mask"].all(), "both prompts are as long: nothing is padded"
    settings = {"max_new_tokens": 6, "min_new_tokens": 6}
    expected = model.generate(**batch, **settings)
    length = batch["input_ids"].shape[1]
    assert torch.equal(model.generate(**batch, **settings, cache_implementation="static"), expected)
    assert torch.equal(model.generate(**batch, **settings, use_cache=False), expected)
    assert torch.equal(model.generate(**batch, **settings, prefill_chunk_size=5), expected)
    features = model.encode_images(batch["pixel_values"])
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(model.generate(**text, patch_features=features, **settings), expected)
    single = processor(images=random_image(0), text=PROMPTS[0], return_tensors="pt")
    assert torch.equal(model.generate(**single, **settings)[0, -6:], expected[0, length:])
    sampled = [model.generate(**batch, max_new_tokens=6, num_beams=3) for _ in range(2)]
    assert torch.equal(*sampled)

    # one graph, no break: what export and the compiling engines need; the compiler behind it makes no difference here
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert torch.equal(model.generate(**batch, **settings, cache_implementation="static"), expected)
