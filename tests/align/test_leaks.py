"""Who sees whom in the Q-Former: perturb one token or patch and look at what moves, for each of the three patterns."""

import pytest
import torch

from blipren import BliprenQFormer, BliprenQFormerConfig

QUERIES, LENGTH, PATCHES = 4, 6, 5


@pytest.fixture(scope="module", params=["post", "pre"])
def qformer(request):
    torch.manual_seed(0)
    config = BliprenQFormerConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_query_tokens=QUERIES,
        encoder_hidden_size=8,
        vocab_size=30,
        use_text=True,
        norm_position=request.param,
        initializer_range=0.3,
        query_init_std=0.3,
    )
    return BliprenQFormer(config).double().eval()


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "patch_features": torch.randn(2, PATCHES, 8, generator=generator, dtype=torch.float64),
        "input_ids": torch.randint(1, 30, (2, LENGTH), generator=generator),
        "text_attention_mask": torch.tensor([[1] * LENGTH, [1] * (LENGTH - 2) + [0] * 2]),
    }


def moved(before, after):
    """Which positions differ, `[batch, positions]`."""
    return (before - after).abs().amax(-1) > 1e-9


def run(qformer, inputs, pattern):
    with torch.no_grad():
        return qformer(**inputs, attention_pattern=pattern)


def changed_token(inputs, row, position):
    ids = inputs["input_ids"].clone()
    ids[row, position] = (ids[row, position] + 7) % 29 + 1
    return {**inputs, "input_ids": ids}


PATTERNS = ["unimodal", "bidirectional", "causal"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("position", range(LENGTH))
def test_what_a_token_moves(qformer, inputs, pattern, position):
    before, after = (run(qformer, batch, pattern) for batch in (inputs, changed_token(inputs, 0, position)))
    text = moved(before.text_states, after.text_states)
    queries = moved(before.query_states, after.query_states)
    if pattern == "causal":
        assert text[0].tolist() == [other >= position for other in range(LENGTH)], (
            "a word sees itself and those before"
        )
    else:
        assert text[0].all()
    assert queries[0].tolist() == [pattern == "bidirectional"] * QUERIES, "only matching lets queries see text"
    assert not text[1].any()
    assert not queries[1].any(), "another row never moves"


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("position", [LENGTH - 2, LENGTH - 1])
def test_padding_moves_nothing_but_itself(qformer, inputs, pattern, position):
    before, after = (run(qformer, batch, pattern) for batch in (inputs, changed_token(inputs, 1, position)))
    assert moved(before.text_states, after.text_states)[1].nonzero().flatten().tolist() == [position]
    assert not moved(before.query_states, after.query_states).any()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_a_patch_moves(qformer, inputs, pattern):
    patches = inputs["patch_features"].clone()
    patches[0, 2] += 1
    before, after = (run(qformer, batch, pattern) for batch in (inputs, {**inputs, "patch_features": patches}))
    assert moved(before.query_states, after.query_states).tolist() == [[True] * QUERIES, [False] * QUERIES]
    text = moved(before.text_states, after.text_states)
    assert text[0].all() if pattern != "unimodal" else not text[0].any(), "contrast keeps image and text apart"
    assert not text[1].any()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_query_is_seen_by_queries_always_by_text_unless_contrast(qformer, inputs, pattern):
    before = run(qformer, inputs, pattern)
    kept = qformer.query_tokens.detach().clone()
    try:
        qformer.query_tokens.data[0, 1, 0] += 1  # one coordinate: a norm takes a constant shift away
        after = run(qformer, inputs, pattern)
    finally:
        qformer.query_tokens.data.copy_(kept)
    assert moved(before.query_states, after.query_states).all()
    assert moved(before.text_states, after.text_states)[0].any() == (pattern != "unimodal")


def test_masked_patches_are_not_seen(qformer, inputs):
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    patches = inputs["patch_features"].clone()
    patches[0, 3:] += 5
    before, after = (
        run(qformer, {**inputs, "patch_features": p, "patch_attention_mask": mask}, "bidirectional")
        for p in (inputs["patch_features"], patches)
    )
    assert not moved(before.query_states, after.query_states).any()


def test_unimodal_states_are_those_of_each_side_alone(qformer, inputs):
    """One joint pass with the unimodal mask, two separate passes: the same embeddings."""
    joint = run(qformer, inputs, "unimodal")
    with torch.no_grad():
        image = qformer(patch_features=inputs["patch_features"])
        text = qformer(input_ids=inputs["input_ids"], text_attention_mask=inputs["text_attention_mask"])
    assert torch.allclose(joint.query_states, image.query_states, atol=1e-12)
    valid = inputs["text_attention_mask"].bool()
    assert torch.allclose(joint.text_states[valid], text.text_states[valid], atol=1e-12)
    assert image.text_states is None
    assert text.query_states is None
