"""Equal tokens in all modes of generation: dynamic, static and no cache, compiled, padded, beams; and sampling."""

import pytest
import torch
from tiny_models import LLM_FAMILIES, random_image

from blipren.training.objectives.sampling import sample_answers

QUICK = ("llama", "opt")  # rotary and learned positions; the others on request
PROMPTS = ["Short caption:", "What colour is the small ball in the picture ?"]


@pytest.mark.parametrize(
    "family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in LLM_FAMILIES]
)
def test_equal_tokens_in_all_modes(family, pair):
    model, processor = pair(llm=family)
    batch = processor(images=[random_image(0), random_image(1)], text=PROMPTS, return_tensors="pt")
    assert not batch["attention_mask"].all(), "both prompts have the same length, so nothing is padded"
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

    # one graph without a break, as export needs it; the backend of the compiler does not matter
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert torch.equal(model.generate(**batch, **settings, cache_implementation="static"), expected)


@pytest.mark.parametrize(
    "family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in LLM_FAMILIES]
)
def test_samples_follow_the_softmax(family, pair):
    """Samples at a temperature near 0 are the greedy answers up to their end; others follow the softmax."""
    model, processor = pair(llm=family)
    batch = processor(images=[random_image(0), random_image(1)], text=PROMPTS, return_tensors="pt")
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    features = {"patch_features": model.encode_images(batch["pixel_values"])}
    greedy = model.generate(**text, **features, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    greedy = greedy[:, batch["input_ids"].shape[1] :].tolist()
    end = greedy[0][2]
    cut = [row[: row.index(end) + 1] if end in row else row for row in greedy]
    drawn = sample_answers(model, **text, features=features, end=end, samples=2, temperature=1e-6, max_new_tokens=6)
    assert drawn == [cut[0], cut[0], cut[1], cut[1]]
    assert len(cut[0]) < 6, "no row ended before the others, so no row was dropped from the cache"

    torch.manual_seed(0)
    drawn = sample_answers(model, **text, features=features, end=end, samples=4000, temperature=0.7, max_new_tokens=1)
    with torch.no_grad():
        positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
        logits = model(**text, **features, position_ids=positions).logits[:, -1].float()
    placeholder = model.config.image_token_id  # never sampled: in training it would be an image
    logits[:, placeholder : placeholder + 1] = -torch.inf
    for row, samples in zip((logits / 0.7).softmax(dim=-1), (drawn[:4000], drawn[4000:]), strict=True):
        counts = torch.bincount(torch.tensor(samples).flatten(), minlength=len(row))
        spread = (4000 * row * (1 - row)).sqrt()
        assert ((counts - 4000 * row).abs() <= 5 * spread + 1).all()


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_inputs_embeds_give_the_tokens_of_input_ids(family, pair):
    model, processor = pair(llm=family)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6}
    batch = processor(images=[random_image(0), random_image(1)], text=PROMPTS, return_tensors="pt")
    text = processor(text=PROMPTS, return_tensors="pt")
    for inputs in (batch, text):
        ids = inputs["input_ids"]
        is_image = ids == processor.image_token_id
        embeds = model.get_input_embeddings()(ids.masked_fill(is_image, 0)).detach()
        if is_image.any():
            features = model.get_image_features(inputs["pixel_values"]).pooler_output
            embeds = embeds.masked_scatter(is_image[..., None], torch.cat(features).detach())
        expected = model.generate(**inputs, **settings)[:, ids.shape[1] :]
        mask = {"attention_mask": inputs["attention_mask"]}
        assert torch.equal(model.generate(inputs_embeds=embeds, **mask, **settings), expected)
        assert torch.equal(model.generate(inputs_embeds=embeds, **mask, **settings, num_beams=3, do_sample=False),
                           model.generate(**inputs, **settings, num_beams=3)[:, ids.shape[1] :])  # fmt: skip


def test_inputs_embeds_with_the_placeholder_take_images(pair):
    model, processor = pair(llm_values={"vocab_size": 400})  # the placeholder has a row of the vocabulary
    inputs = dict(processor(images=random_image(0), text=PROMPTS[1], return_tensors="pt"))
    ids = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    expected = model.generate(ids, **inputs, max_new_tokens=6, min_new_tokens=6)[:, ids.shape[1] :]
    assert torch.equal(model.generate(inputs_embeds=embeds, **inputs, max_new_tokens=6, min_new_tokens=6), expected)
