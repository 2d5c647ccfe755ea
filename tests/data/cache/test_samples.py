"""Conversations in a cache: each image once, splits by image, and the same tokens as at inference."""

import json

import numpy as np
import pytest
import torch

from blipren.prompts_blipren import build_chat_template
from blipren.training.commands.embed import EmbedSettings
from blipren.training.commands.embed import run as embed
from blipren.training.data.cache.engines import ray_cluster
from blipren.training.data.cache.samples.tokens import encode_sample, split_trace
from blipren.training.data.sources.conversations import read_conversation
from blipren.training.engine.loading import load_checkpoint
from blipren.training.errors import UserError
from tests.data.sources.test_conversations import FORMS
from tests.data.tools import encoded, make_model, picture, run_embed, write_folder
from tests.tiny_models import make_llm


def turns(*texts):
    return [{"from": role, "value": text} for role, text in zip(["human", "gpt"] * len(texts), texts)]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory, tiny_vision):
    folder = tmp_path_factory.mktemp("chat")
    return make_model(folder / "model", tiny_vision, make_llm(folder / "llm", "qwen2", chat=True))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """Twelve images and conversations about none, one and two of them; images of several splits."""
    folder = tmp_path_factory.mktemp("llava")
    pictures = {f"images/{i}.jpg": encoded(picture(i)) for i in range(12)}
    pictures["images/copy.jpg"] = pictures["images/0.jpg"]
    pictures["images/broken.jpg"] = b"\xff\xd8\xff" + b"no picture" * 9
    write_folder(folder, [], pictures)

    def row(name, image, *texts, **more):
        return {"id": name, "conversations": turns(*texts)} | ({"image": image} if image else {}) | more

    rows = [
        row(f"a{i}", f"{i}.jpg", "<image>\nWhat?", f"picture {i}", "Sure?", "yes", split=split)
        for i, split in enumerate(["train"] * 8 + ["validation"] * 2 + ["test"] * 2)
    ]
    rows += [
        row("same", "0.jpg", "<image>\nWhich colour?", "red", split="train"),
        row("copy", "copy.jpg", "<image>\nOf a copy?", "yes", split="train"),
        row("two", ["1.jpg", "2.jpg"], "<image><image>\nWhich is larger?", "the second", split="train"),
        row("held out", ["3.jpg", "11.jpg"], "<image> or <image> here?", "the first", split="train"),
        row("later", ["4.jpg", "5.jpg"], "<image>\nWhat?", "this", "And <image> there?", "that", split="train"),
        row("text", None, "Who are you?", "A model.", split="train"),
        row("broken", "broken.jpg", "<image>\nWhat?", "nothing", split="train"),
        row("missing", "nowhere.jpg", "<image>\nWhat?", "nothing", split="train"),
        row("empty", "6.jpg", "<image>\nWhat?", " ", split="train"),
        row("captions", "7.jpg", "<image>\nWhat?", "it is", caption="a caption", split="train"),
    ]
    rows.append({"id": "caption alone", "image": "8.jpg", "caption": "another one", "split": "validation"})
    (folder / "llava.json").write_text(json.dumps(rows))
    return folder / "llava.json"


@pytest.fixture(scope="module")
def cache(tmp_path_factory, chat_model, llava):
    return run_embed(chat_model, llava, tmp_path_factory.mktemp("cache") / "c")


def test_every_image_is_stored_once_and_every_row_accounted_for(cache):
    assert [cache.num_rows(split) for split in ("train", "validation", "test")] == [8, 2, 2]
    counts = cache.counts["samples"]
    assert counts == {
        "rows": 23, "train": 14, "validation": 2, "test": 3, "captions_only": 1, "rejected": 3,
    }  # fmt: skip
    lines = list(map(json.loads, (cache.folder / "rejected.jsonl").open()))
    assert {line["id"]: line["reason"] for line in lines if line["kind"] == "sample"} == {
        "empty": "empty_turn", "missing": "missing_file", "broken": "image",
    }  # fmt: skip
    assert cache.verify() == []


def test_the_ray_engine_gives_the_same_cache(tmp_path, chat_model, llava, cache, monkeypatch):
    """Its actors' own class embeds every unit, in this process: tests/data/cache/test_ray.py starts Ray."""

    def run_here(s, job, units):
        actor = ray_cluster.EmbedUnits({name: getattr(s, name) for name in s.__dataclass_fields__})
        for number in units:
            actor({"unit": [number]})

    monkeypatch.setattr(ray_cluster, "_run", run_here)
    found = run_embed(chat_model, llava, tmp_path / "c", engine="ray", rows_per_shard=3)
    assert found.counts == cache.counts and found.verify() == []
    for split in ("train", "validation", "test"):
        assert found.split(split).to_list() == cache.split(split).to_list()
        assert found.samples(split).to_list() == cache.samples(split).to_list()


def test_a_dry_run_names_the_rejected_conversations(tmp_path, chat_model, llava, capsys):
    values = {"model": str(chat_model), "dataset": str(llava), "cache": str(tmp_path / "c"), "workers": 0}
    embed(EmbedSettings(**values, dry_run=True))
    shown = capsys.readouterr().out
    assert "20 conversations about 13 images" in shown and "missing_file" in shown and "empty_turn" in shown
    assert not (tmp_path / "c").exists()


def test_a_held_out_image_holds_the_sample_out(cache):
    samples = {split: cache.samples(split) for split in ("train", "validation", "test")}
    assert "held out" in samples["test"]["id"]
    rows = cache.num_rows("train")
    assert all(image < rows for images in samples["train"]["images"] for image in images)
    text = samples["train"]["id"].index("text")
    assert samples["train"]["images"][text] == []


def test_features_by_number_and_captions_beside_conversations(cache):
    test = cache.samples("test")
    first, second = test["images"][test["id"].index("held out")]
    features, _ = cache.features_at([first, second, first])
    train, held = cache.ids("train").index("3.jpg"), cache.ids("test").index("11.jpg")
    assert torch.equal(features[0], cache.patch_features("train", [train])[0][0])
    assert torch.equal(features[1], cache.patch_features("test", [held])[0][0])
    assert torch.equal(features[0], features[2])
    answers = dict(zip(cache.ids("train"), cache.split("train")["answers"]))
    assert answers["7.jpg"] == ["a caption"] and answers["6.jpg"] == []
    both = cache.samples("train")
    assert both["images"][both["id"].index("copy")] == both["images"][both["id"].index("same")]


def test_text_alone_makes_a_cache(tmp_path, chat_model):
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}]}
        for i in range(20)
    ]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = run_embed(chat_model, tmp_path / "text.jsonl", tmp_path / "c", validation_share=0.3)
    assert len(cache) == 0 and 0 < cache.num_samples("validation") < cache.num_samples("train")


def test_too_long_conversations_are_refused_or_cut_at_a_turn(tmp_path, chat_model, llava, cache):
    _, processor = load_checkpoint(str(chat_model))
    lengths = [len(ids) for s in range(14) for ids, _ in cache.sample_tokens("train", processor).segments(s)]
    limit = max(lengths)  # images have one placeholder there, and four tokens when they are counted
    refused = run_embed(chat_model, llava, tmp_path / "a", max_tokens=limit)
    cut = run_embed(chat_model, llava, tmp_path / "b", max_tokens=limit, cut_turns=True)
    assert refused.counts["rejected_by_reason"]["sample"]["max_tokens"] >= 1
    assert "max_tokens" not in cut.counts["rejected_by_reason"]["sample"]
    later = cut.samples("train")
    place = later["id"].index("later")
    assert len(json.loads(later["messages"][place])) == 2 and len(later["images"][place]) == 1
    with pytest.raises(UserError, match="max_tokens"):
        run_embed(chat_model, llava, tmp_path / "a", max_tokens=limit + 1)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_tokens_are_those_of_inference_and_labels_those_of_answers(form, chat, chat_model, tiny_model):
    """Laws 2, 3 and 11, for every form and with and without a chat template."""
    record, columns, image, _, _ = FORMS[form]
    messages = read_conversation(record, columns, image).messages
    _, processor = load_checkpoint(str(chat_model if chat else tiny_model))
    segments = encode_sample(processor, messages)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    found = []
    for ids, learned in segments:
        edges = np.flatnonzero(np.diff([0, *learned, 0]))
        found += [(ids[:begin], ids[begin:end]) for begin, end in zip(edges[::2], edges[1::2])]
    for turn, (prompt, answer) in zip(answers, found, strict=True):
        chat_form = [{"role": m["role"], "content": m["content"]} for m in messages[:turn]]
        images = sum(part["type"] == "image" for m in chat_form for part in m["content"])
        assert prompt == processor.encode_conversation(chat_form, [1] * images)
        trace, text = split_trace("".join(part["text"] for part in messages[turn]["content"]))
        assert answer == (processor.encode_trace(trace) if trace else []) + processor.encode_answer(text)
        assert answer.count(processor.answer_end_id) == 1 and answer[-1] == processor.answer_end_id
        assert prompt.count(processor.image_token_id) == images and processor.image_token_id not in answer
        if not any("<" in part.get("text", "") for m in chat_form for part in m["content"]):
            # and what apply_chat_template gives a user of the checkpoint, who has no escaping
            text = processor.apply_chat_template(chat_form, add_generation_prompt=True, tokenize=False)
            assert prompt == processor.tokenizer(processor._strip_duplicate_bos(text)).input_ids
    if chat:
        assert len(segments) == 1


def test_a_template_that_forgets_history_gives_segments_of_their_own(chat_model):
    _, processor = load_checkpoint(str(chat_model))
    processor.chat_template = processor.chat_template.replace(
        "message['content'] +", "(message['content'] if message['role'] == 'user' else '...') +"
    )
    record, columns, image, _, _ = FORMS["the_cauldron and FineVision"]
    messages = read_conversation(record, columns, image).messages
    segments = encode_sample(processor, messages)
    assert len(segments) == 2
    ids, learned = segments[1]
    prompt = processor.encode_conversation(messages[:3], [1])
    assert ids[: len(prompt)] == prompt and learned.count(True) == len(processor.encode_answer("Yes."))


QWEN3_LIKE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


@pytest.mark.parametrize("own_tokens", [True, False])
def test_traces_are_learned_masked_or_dropped(own_tokens, chat_model):
    _, processor = load_checkpoint(str(chat_model))
    if own_tokens:
        processor.tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
        processor.chat_template = build_chat_template(QWEN3_LIKE, processor.image_token, "")
    record = {
        "messages": [
            {"role": "user", "content": "2+2 ?"},
            {"role": "assistant", "content": "<think>It is </s> four.</think> 4"},
            {"role": "user", "content": "Sure ?"},
            {"role": "assistant", "content": "yes"},
        ]
    }
    messages = read_conversation(record, FORMS["a trace of its own"][1], None).messages
    trace = processor.encode_trace("It is </s> four.")
    four, yes = processor.encode_answer("4"), processor.encode_answer("yes")
    assert processor.tokenizer.convert_tokens_to_ids("</s>") not in trace
    for traces, learned in (("learn", [trace + four, yes]), ("mask", [four, yes]), ("drop", [four, yes])):
        segments = encode_sample(processor, messages, traces=traces)
        flat = [token for ids, flags in segments for token, flag in zip(ids, flags) if flag]
        assert flat == learned[0] + learned[1]
        assert len(segments) == (1 if traces == "drop" and not own_tokens else 2)
        first, last = segments[0][0], segments[-1][0]
        thinks = traces != "drop"
        prompt = processor.encode_conversation(messages[:1], [], thinking=thinks)
        assert first[: len(prompt)] == prompt and (trace == first[len(prompt) :][: len(trace)]) == thinks
        history = [messages[0], {"role": "assistant", "content": "4"}, messages[2]]
        assert last[: -len(yes)] == processor.encode_conversation(history, [])


def test_the_data_sets_system_prompt_wins_over_the_pool(chat_model):
    _, processor = load_checkpoint(str(chat_model))
    processor.system_prompts = ["be brief", "be kind"]
    plain = [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]  # fmt: skip
    own = [{"role": "system", "content": [{"type": "text", "text": "be exact"}]}, *plain]
    texts = [
        processor.tokenizer.decode(encode_sample(processor, messages, system)[0][0])
        for messages in (plain, own)
        for system in processor.system_prompts
    ]
    assert ["brief" in text for text in texts] == [True, False, False, False]
    assert "kind" in texts[1] and "exact" in texts[2] and texts[2] == texts[3]
