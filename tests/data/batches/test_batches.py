"""Batches: a pure function of rows, seed and step; little padding; equal in loss and gradients to padded rows."""

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.nn.attention import flex_attention

from blipren.training.data.batches import masks
from blipren.training.data.batches.blocks import PromptEncoder, build_blocks
from blipren.training.data.batches.datasets import EvalBatches, Layout, TrainBatches
from blipren.training.data.batches.draws import DRAW, seeded_generator
from blipren.training.data.batches.packing import pack_by_capacity, pack_rows
from blipren.training.data.batches.plan import BatchPlan
from tests.data.batches.toys import (
    CONVERSATIONS,
    EOS,
    IMAGE,
    PAD,
    VISUAL,
    VOCABULARY,
    ToyData,
    ToyProcessor,
    ToySamples,
    toy_texts,
)


def plan(sizes=(23,), weights=(1.0,), **changes):
    return BatchPlan(
        **{"sizes": sizes, "weights": weights, "seed": 5, "images_per_step": 6, "micro_batches": 2} | changes
    )


def test_epoch_takes_every_image_once_and_steps_are_even():
    p = plan()
    steps = [p.step_images(k) for k in range(p.steps_per_epoch)]
    assert all(epoch == 0 for epoch, _ in steps)
    assert sorted(np.concatenate([images for _, images in steps])[:, 1]) == list(range(23))
    assert {len(images) for _, images in steps} == {5, 6}
    assert not np.array_equal(p.epoch_images(0), p.epoch_images(1))


def test_weights_take_a_cache_more_or_less_often():
    p = plan(sizes=(10, 7), weights=(0.5, 2.0))
    first, second = p.epoch_images(0), p.epoch_images(1)
    both = np.concatenate([first, second])
    assert sorted(both[both[:, 0] == 0][:, 1]) == list(range(10))  # half of it in each of two epochs
    assert sorted(first[first[:, 0] == 1][:, 1]) == sorted([*range(7)] * 2)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_do_not_depend_on_world_size_or_on_what_was_asked_before(world):
    source = ToyData(toy_texts(23))
    prompts, layout = PromptEncoder(ToyProcessor()), Layout(pad_token_id=PAD)
    one = TrainBatches([source], prompts, plan(micro_batches=4), layout, steps=9)
    reference = [one[i] for i in range(len(one))]
    fresh = TrainBatches([source], PromptEncoder(ToyProcessor()), plan(micro_batches=4), layout, steps=9)
    for rank in range(world):
        for item in reversed(range(rank, len(fresh), world)):
            ours, theirs = fresh[item], reference[item]
            assert ours["ids"] == theirs["ids"]
            assert torch.equal(ours["input_ids"], theirs["input_ids"])
            assert torch.equal(ours["targets"], theirs["targets"])


def test_prompts_and_system_prompts_are_drawn_by_seed_and_fixed_in_validation():
    source = ToyData([[(None, "rain")] * 5] * 12)
    prompts, layout = PromptEncoder(ToyProcessor()), Layout(pad_token_id=PAD)
    train = TrainBatches([source], prompts, plan(sizes=(12,)), layout, steps=8)
    prefixes, tails = set(), set()
    for item in range(len(train)):
        epoch, images = train.plan.micro_batch(*divmod(item, 2))
        for _, image in images:
            random = seeded_generator(5, epoch, DRAW, 0, image)
            for block in build_blocks((0, image), source.texts.answers(image), VISUAL, prompts, random):
                prefixes.add(tuple(block.prefix))
                tails |= {tuple(segment.last_answer()[0]) for segment in block.segments}
    assert len(prefixes) == 2 and len(tails) == 3
    blocks = build_blocks((0, 0), source.texts.answers(0), VISUAL, prompts)
    (block,) = blocks
    assert {tuple(segment.last_answer()[0]) for segment in block.segments} == {
        tuple(ToyProcessor().encode_answer("describe:")[:-1])
    }


def test_every_answer_and_one_eos_each_are_targets_and_nothing_else():
    texts = toy_texts(9)
    source, prompts = ToyData(texts), PromptEncoder(ToyProcessor())
    wanted = sorted(tuple(ToyProcessor().encode_answer(answer)) for row in texts for _, answer in row)
    for shared in (True, False):
        data = EvalBatches([source], prompts, Layout(pad_token_id=PAD, shared_prefix=shared), 4)
        got, current = [], []
        for item in range(len(data)):
            for target in data[item]["targets"].tolist():
                current.append(target)
                if target == EOS:
                    got.append(tuple(current))
                    current = []
        assert current == [] and sorted(got) == wanted
        assert [i for item in range(len(data)) for i in dict.fromkeys(data[item]["ids"])] != []


def test_pack_and_useful_share():
    random = np.random.default_rng(0)
    for low, high, images in ((60, 130, 32), (80, 116, 8), (45, 52, 32), (49, 99, 36), (17, 27, 48)):
        shares = []
        for _ in range(20):
            lengths = random.integers(low, high, images).tolist()
            bins = pack_rows(lengths)
            assert sorted(i for b in bins for i in b) == list(range(images))
            area = len(bins) * max(sum(lengths[i] for i in b) for b in bins)
            shares.append(sum(lengths) / area)
        assert np.mean(shares) >= 0.96 and min(shares) >= 0.93, (low, high, images)
    lengths = random.integers(60, 130, 32).tolist()
    assert all(sum(lengths[i] for i in b) <= 260 for b in pack_rows(lengths, 260))
    assert pack_by_capacity([50, 10], 20) == [[0], [1]]  # too long for the capacity: alone


def test_long_image_is_cut_into_blocks_and_a_cut_answer_has_no_eos():
    source, prompts = ToyData([[(None, "abcdefgh")] * 20]), PromptEncoder(ToyProcessor())
    blocks = build_blocks((0, 0), source.texts.answers(0), VISUAL, prompts, max_block_tokens=80)
    assert len(blocks) > 1 and all(len(b) <= 80 for b in blocks) and sum(len(b.segments) for b in blocks) == 20
    (block,) = build_blocks((0, 0), source.texts.answers(0), VISUAL, prompts, max_answer_tokens=3)
    answers = [segment.last_answer()[1] for segment in block.segments]
    assert all(len(answer) == 3 and EOS not in answer for answer in answers)


def test_a_step_too_small_for_its_parts_is_refused():
    with pytest.raises(ValueError, match="cannot be cut into 8 micro-batches"):
        plan(sizes=(5,), micro_batches=8)
    with pytest.raises(ValueError, match="no image"):
        plan(sizes=(0,))


def test_several_sources_keep_the_order_of_placeholders_and_pad_features():
    a, b = ToyData(toy_texts(6), patches=3), ToyData(toy_texts(6, 1), patches=5, name="b")
    p = plan(sizes=(6, 6), weights=(1.0, 1.0), images_per_step=12, micro_batches=1)
    batch = TrainBatches([a, b], PromptEncoder(ToyProcessor()), p, Layout(pad_token_id=PAD), steps=1)[0]
    features, mask = batch["inputs"]["patch_features"], batch["inputs"]["patch_attention_mask"]
    assert len(batch["ids"]) == 12 and features.shape[:2] == (12, 5)
    for i, name in enumerate(batch["ids"]):
        assert features[i, 0, 0] == int(name[1:])
        assert mask[i].sum() == (3 if name[0] == "a" else 5)


TINY = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS,
)  # fmt: skip
FAMILIES = {
    "Llama": {}, "Qwen2": {}, "Qwen3": {"head_dim": 8}, "Gemma": {"head_dim": 8}, "Phi": {}, "Phi3": {},
    "SmolLM3": {}, "Granite": {}, "Olmo2": {}, "Cohere": {}, "StableLm": {}, "Mistral": {"sliding_window": 200},
    "Gemma2": {"head_dim": 8, "sliding_window": 200}, "GPTNeoX": {}, "GPT2": {"cls": "GPT2LMHeadModel"}, "OPT": {}, "Falcon": {},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 200, "cls": "Gemma3ForCausalLM"},
}  # fmt: skip
RENAMED = {
    "GPT2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=256, n_inner=48),
    "OPT": dict(ffn_dim=48, word_embed_proj_dim=32),
}


def tiny_llm(family, **changes):
    changes = dict(FAMILIES.get(family, {})) | changes
    cls = changes.pop("cls", f"{family}ForCausalLM")
    config = getattr(transformers, f"{family}Config")(**TINY | RENAMED.get(family, {}) | changes)
    torch.manual_seed(0)
    model = getattr(transformers, cls)(config).double().eval()
    for p in model.parameters():  # away from zero biases and tiny initial weights, so that differences would show
        p.data.add_(torch.randn_like(p), alpha=0.1)
    return model


def loss_of(llm, batch, features):
    """Summed answer loss of a batch through a bare LLM; image i's features stand at its placeholders."""
    order = [int(name[1:]) for name in batch["ids"]]
    embeds = llm.get_input_embeddings()(batch["input_ids"])
    image_places = batch["input_ids"] == IMAGE
    embeds = embeds.masked_scatter(image_places[..., None], features[order])
    mask = masks.build_attention_mask(batch, llm)
    out = llm(inputs_embeds=embeds, attention_mask=mask, position_ids=batch["position_ids"], use_cache=False)
    logits = out.logits.flatten(0, 1)[batch["predict_from"]]
    return F.cross_entropy(logits, batch["targets"], reduction="sum")


def loss_and_gradients(llm, shared, source=None):
    source, prompts = source or ToyData(toy_texts(5)), PromptEncoder(ToyProcessor())
    batch = EvalBatches([source], prompts, Layout(pad_token_id=PAD, shared_prefix=shared), 5)[0]
    features = torch.randn(5, VISUAL, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    features.requires_grad_()
    llm.zero_grad()
    loss = loss_of(llm, batch, features)
    loss.backward()
    return loss.item(), [features.grad, *(p.grad for p in llm.parameters() if p.grad is not None)]


EAGER = ["Llama", "Gemma2", "Gemma3Text", "GPT2", "OPT"]  # transformers gives Gemma 2 no SDPA attention


@pytest.mark.parametrize(
    "family, attention", [(f, "sdpa") for f in FAMILIES if f != "Gemma2"] + [(f, "eager") for f in EAGER]
)
def test_shared_prefix_equals_padded_rows(family, attention):
    """In float64, but for the norms, rotations and softmaxes that several families always compute in float32.
    Answers about images, and conversations about none, one and several."""
    llm = tiny_llm(family)
    llm.set_attn_implementation(attention)
    for source in (None, ToySamples(CONVERSATIONS)):
        (loss, gradients), (padded_loss, padded_gradients) = (
            loss_and_gradients(llm, shared, source) for shared in (True, False)
        )
        assert loss == pytest.approx(padded_loss, rel=1e-8)
        largest = max(g.norm() for g in padded_gradients)  # key biases have no gradient but rounding
        for ours, theirs in zip(gradients, padded_gradients, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-8 * largest


def test_conversations_about_the_same_images_share_them_and_see_nothing_of_each_other():
    source, prompts = ToySamples(CONVERSATIONS), PromptEncoder(ToyProcessor())
    assert len(source) == 5
    blocks = source.blocks(0, 0, prompts, None, Layout(pad_token_id=PAD))
    (block,) = blocks
    assert block.images == [(0, 0)] and len(block.segments) == 2 and block.prefix.count(IMAGE) == VISUAL
    encode = ToyProcessor().encode_answer
    learned = [[t for t, flag in zip(s.ids, s.learned) if flag] for s in block.segments]
    assert learned == [encode("a dog") + encode("it runs"), encode("red")]
    (later,) = source.blocks(2, 0, prompts, None, Layout(pad_token_id=PAD))
    assert later.images == [(0, 3)] and later.segments[0].images == ((0, 4), (0, 1))
    assert later.segments[0].ids.count(IMAGE) == 2 * VISUAL
    (text,) = source.blocks(3, 0, prompts, None, Layout(pad_token_id=PAD))
    assert text.images == [] and text.prefix == [] and len(text.segments) == 1
    drawn = {
        len(b.segments)
        for seed in range(20)
        for b in source.blocks(
            0, 0, prompts, np.random.default_rng(seed), Layout(pad_token_id=PAD, answers_per_image=1)
        )
    }
    assert drawn == {1}


def test_answers_of_conversations_are_cut_one_by_one():
    source, prompts = ToySamples(CONVERSATIONS), PromptEncoder(ToyProcessor())
    (block,) = source.blocks(0, 0, prompts, None, Layout(pad_token_id=PAD, max_answer_tokens=3))
    segment = block.segments[0]
    encode = ToyProcessor().encode_answer
    assert [t for t, flag in zip(segment.ids, segment.learned) if flag] == encode("a dog")[:3] + encode("it runs")[:3]
    assert segment.ids[-1] == encode("it runs")[2] and EOS in segment.ids  # the first answer is read as a whole


def test_preferences_are_two_answers_to_one_prompt():
    rows = [(["|what?", "a dog", "sure?", "yes it is"], [0], "no"), (["|which?", "red"], [0], "blue")]
    source, prompts = ToySamples(rows, pairs=True), PromptEncoder(ToyProcessor())
    (block,) = source.blocks(0, 0, prompts, None, Layout(pad_token_id=PAD))
    encode = ToyProcessor().encode_answer
    assert [s.last_answer()[1] for s in block.segments] == list(map(encode, ("yes it is", "no", "red", "blue")))
    assert block.segments[0].last_answer()[0] == block.segments[1].last_answer()[0]
    assert [sum(s.learned) for s in block.segments] == [len(s.last_answer()[1]) for s in block.segments]


def test_batches_of_texts_alone_and_of_both_kinds():
    texts, answers = ToySamples(CONVERSATIONS[4:]), ToyData(toy_texts(5))
    prompts, layout = PromptEncoder(ToyProcessor()), Layout(pad_token_id=PAD)
    batch = EvalBatches([texts], prompts, layout, 2)[0]
    assert batch["inputs"] == {} and batch["ids"] == [] and len(batch["targets"])
    p = plan(sizes=(5, 5), weights=(1.0, 2.0), images_per_step=15, micro_batches=1)
    both = TrainBatches([answers, ToySamples(CONVERSATIONS)], prompts, p, layout, steps=1)[0]
    assert (
        (both["input_ids"] == IMAGE).sum()
        == VISUAL * len(both["ids"])
        == VISUAL * len(both["inputs"]["patch_features"])
    )


FLEXIBLE = ["Llama", "Qwen3", "Gemma2", "GPTNeoX", "SmolLM3"]


@pytest.mark.parametrize("family", FLEXIBLE)
def test_flex_attention_equals_padded_rows(family, monkeypatch):
    """Uncompiled, with torch's refusal of a backward pass on CPUs taken out: the kernels that it lacks are not used.
    Compiled, forward, in the last lines."""
    llm = tiny_llm(family)
    padded_loss, padded_gradients = loss_and_gradients(llm, False)
    llm.set_attn_implementation("flex_attention")
    with monkeypatch.context() as patched, torch.compiler.set_stance("force_eager"):
        patched.setattr(flex_attention, "_validate_device", lambda *tensors: None)
        loss, gradients = loss_and_gradients(llm, True)
    assert loss == pytest.approx(padded_loss, rel=1e-8)
    largest = max(g.norm() for g in padded_gradients)
    for ours, theirs in zip(gradients, padded_gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-8 * largest


@pytest.fixture
def fresh_compiler():
    """torch makes sizes dynamic that it has seen change, and its FlexAttention for CPUs does not compile with such."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_flex_attention_compiled_and_with_hidden_words(fresh_compiler):
    llm, source, prompts = tiny_llm("Llama").float(), ToyData(toy_texts(5)), PromptEncoder(ToyProcessor())
    batch = EvalBatches([source], prompts, Layout(pad_token_id=PAD), 5)[0]
    hidden = batch["is_answer"] & (
        torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(0)) < 0.5
    )
    states = []
    for attention in ("sdpa", "flex_attention"):
        llm.set_attn_implementation(attention)
        mask = masks.build_attention_mask(batch, llm, hidden)
        with torch.no_grad():
            out = llm(
                input_ids=batch["input_ids"], attention_mask=mask, position_ids=batch["position_ids"], use_cache=False
            )
        states.append(out.logits[batch["block_ids"] >= 0])
    assert isinstance(mask, flex_attention.BlockMask)
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4)


def test_the_block_mask_is_what_makes_them_equal(monkeypatch):
    def causal_only(row, head, i, j):
        return (j <= i) & (row >= 0)

    llm = tiny_llm("Llama")
    right = loss_and_gradients(llm, True)[0]
    monkeypatch.setattr(masks, "build_attention_rule", lambda *ids: causal_only)
    assert abs(loss_and_gradients(llm, True)[0] - right) > 1e-3 * right


def test_first_token_behind_an_empty_prompt_is_predicted_by_the_last_image_token():
    class NoPrompt(ToyProcessor):
        prompts = [""]

    llm, source = tiny_llm("Llama"), ToyData([[(None, "rain"), (None, "")], [(None, "two cats")]])
    features = torch.randn(2, VISUAL, 32, dtype=torch.float64)
    losses = [
        loss_of(llm, EvalBatches([source], PromptEncoder(NoPrompt()), layout, 2)[0], features).item()
        for layout in (Layout(pad_token_id=PAD), Layout(pad_token_id=PAD, shared_prefix=False))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
