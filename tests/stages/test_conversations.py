"""Conversations in `blipren train`: the loss of TRL's SFTTrainer, resume, two processes, mixed with captions."""

import json
import shutil

import pytest
import torch

from blipren import BliprenForConditionalGeneration
from blipren.training.commands.embed import EmbedSettings
from blipren.training.commands.embed import run as embed
from blipren.training.data.batches.blocks import PromptEncoder
from blipren.training.data.batches.datasets import EvalBatches, Layout
from blipren.training.data.batches.masks import build_attention_mask
from blipren.training.data.batches.training_data import open_split
from blipren.training.data.cache import FeatureCache
from blipren.training.engine.loading import load_checkpoint
from blipren.training.errors import UserError
from blipren.training.evaluation.report.training import text_loss_line
from blipren.training.stages import train as caption
from tests import tiny_models
from tests.stages.test_processes import finish, needs_deepspeed, same, with_deepspeed
from tests.stages.test_resume import run_with_kills, same_bits
from tests.stages.tools import events, fork_command, make_model, weights


def turns(*texts):
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * len(texts), texts)]


@pytest.fixture(scope="session")
def chat_rows(dataset_dir):
    """Rows about drawn pictures: two turns, one about two pictures, a system prompt, and text alone."""
    rows = []
    for i in range(12):
        split = "train" if i < 8 else "validation"
        rows.append({"image": f"{i}.png", "messages": turns("What colour ?", f"It is {i} .", "Sure ?", "yes")})
        rows.append({"image": f"{i}.png", "messages": turns("Which shape ?", "A circle .")})
        other = i + 1 if i not in (7, 11) else i - 1
        rows.append({"image": [f"{i}.png", f"{other}.png"], "messages": turns("Which is larger ?", "the second")})
        rows.append({"messages": turns("Who are you ?", f"A model {i}", "Really ?", "yes")})
        for row in rows[-4:]:
            row["split"] = split
    return rows


@pytest.fixture(scope="session")
def chat_dir(chat_rows, dataset_dir):
    path = dataset_dir / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chat_rows))
    return path


@pytest.fixture(scope="session")
def chat_cache(tmp_path_factory, model_dir, chat_dir):
    cache = tmp_path_factory.mktemp("chat") / "cache"
    embed(EmbedSettings(model=str(model_dir), dataset=str(chat_dir), cache=str(cache), dtype="float32", workers=0))
    return cache


@pytest.fixture
def mixed(settings, deterministic_model, cache_dir, chat_cache):
    """Function from changes to settings of a run on captions and conversations, drawn one to three."""

    def make(**changes):
        values = {"cache": f"{cache_dir}=1,{chat_cache}=3", "model": str(deterministic_model)}
        return settings(**values | {"log_every": 1, "save_every": 3, "max_steps": 6} | changes)

    return make


@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
def test_captions_conversations_and_texts_are_trained_on_together(tuning, mixed, tmp_path, capsys):
    assert caption.train(mixed(llm_tuning=tuning, max_steps=12, learning_rate=1e-2)) == 0
    train = events(tmp_path / "run", "train")
    assert train[-1]["loss"] < train[0]["loss"]
    sizes = 32 * 1 + 3 * (8 + 8 + 8)  # images with answers; images, pairs and texts with conversations
    assert f"an epoch of {sizes:,} images" in capsys.readouterr().out
    assert {e["images"] for e in events(tmp_path / "run", "validation")} == {8}
    BliprenForConditionalGeneration.from_pretrained(tmp_path / "run")
    finished = json.loads((tmp_path / "run" / "finished.json").read_text())
    if tuning == "frozen":
        assert "text_loss" not in finished
    else:  # what it costs the language model, in the run's report too
        assert finished["text_loss"]["before"] != finished["text_loss"]["after"] > 0
        assert f"{finished['text_loss']['after']:.4f} after" in text_loss_line(str(tmp_path / "run"))


def test_packed_rows_padded_rows_and_micro_batches_train_alike(mixed, tmp_path):
    for name, changes in (("run", {}), ("padded", {"shared_prefix": False}), ("parts", {"micro_batches": 4})):
        caption.train(mixed(out=str(tmp_path / name), max_steps=3, generate_samples=0, **changes))
    for name in ("padded", "parts"):
        same(tmp_path / "run", tmp_path / name)


def test_a_run_resumes_to_the_same_bits_and_two_processes_equal_one(mixed, tmp_path):
    process = fork_command(mixed(out=str(tmp_path / "two"), micro_batches=6), processes=2)
    caption.train(mixed(micro_batches=6))
    finish(process)
    same(tmp_path / "run", tmp_path / "two")
    once = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-6")
    for name in ("finished.json", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    caption.train(mixed(micro_batches=6))
    again = weights(tmp_path / "run")
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.slow
def test_five_kills_end_with_the_same_bits(mixed, tmp_path):
    """Captions and conversations, with everything that draws: system prompts, conversations, dropout; with an average."""
    never = mixed(
        max_steps=18, eval_every=6, workers=2, generate_samples=0, micro_batches=2, llm_tuning="lora", ema=0.9,
        answers_per_image=1, feature_noise=0.1,
    )  # fmt: skip
    killed = type(never)(**never.__dict__ | {"out": str(tmp_path / "killed")})
    caption.train(never)
    run_with_kills(killed, tmp_path / "killed", [(1, 0.0), (4, 0.02), (7, 0.011), (11, 0.007), (14, 0.03)])
    same_bits(weights(tmp_path / "run"), weights(tmp_path / "killed"))


@pytest.mark.slow
@needs_deepspeed
def test_deepspeed_trains_conversations_as_one_process_does(mixed, tmp_path):
    one = mixed(micro_batches=2, generate_samples=0)
    process = fork_command(with_deepspeed(type(one)(**one.__dict__ | {"out": str(tmp_path / "two")}), "zero2"), 2)
    caption.train(one)
    assert "2 processes" in finish(process)
    same(tmp_path / "run", tmp_path / "two")


def test_sharded_conversations_train_as_one_process_does(mixed, chat_rows, dataset_dir, model_dir, tmp_path):
    """FSDP2 with two micro-batches a process. A conversation without an image is refused: its connector would not run."""
    refused = fork_command(mixed(fsdp=True, out=str(tmp_path / "refused")), processes=2)
    rows = dataset_dir / "chat-with-images.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in chat_rows if "image" in row))
    cache = str(tmp_path / "cache")
    embed(EmbedSettings(model=str(model_dir), dataset=str(rows), cache=cache, dtype="float32", workers=0))
    assert "8 conversations have no image: with fsdp" in refused.communicate(timeout=300)[0] and refused.returncode
    one = mixed(cache=cache, micro_batches=4, generate_samples=0)
    process = fork_command(type(one)(**one.__dict__ | {"out": str(tmp_path / "two"), "fsdp": True}), processes=2)
    caption.train(one)
    assert "2 processes" in finish(process)
    same(tmp_path / "run", tmp_path / "two")


def test_conversations_alone_log_answers_in_their_context(settings, chat_cache, tmp_path):
    caption.train(settings(cache=str(chat_cache), generate_samples=2))
    samples = events(tmp_path / "run", "sample")
    assert {e["when"] for e in samples} == {"before", "during", "after"}
    assert {e["prompt"] for e in samples} <= {"Sure ?", "Which shape ?", "Which is larger ?", "Really ?"}


def test_texts_alone_need_a_language_model_that_is_trained(settings, model_dir, tmp_path):
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"messages": turns(f"{i} ?", "yes")}) + "\n" for i in range(40))
    )
    embed(
        EmbedSettings(model=str(model_dir), dataset=str(tmp_path / "text.jsonl"), cache=str(tmp_path / "c"), workers=0)
    )
    with pytest.raises(UserError, match="no conversation has an image"):
        caption.train(settings(cache=str(tmp_path / "c")))
    caption.train(settings(cache=str(tmp_path / "c"), out=str(tmp_path / "full"), llm_tuning="full"))
    assert events(tmp_path / "full", "train")[-1]["loss"] < events(tmp_path / "full", "train")[0]["loss"]


def test_experiments_are_refused_with_conversations(settings, chat_cache):
    with pytest.raises(UserError, match="experiments learn from captions alone"):
        caption.train(settings(cache=str(chat_cache), experiments={"bag_of_words": {"weight": 0.1}}))


GENERATION = (  # nothing stands behind the end token of the last answer: TRL learns all of a completion
    "{% for message in messages %}{{ '' if loop.first else '\\n' }}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def chat_checkpoint(tmp_path_factory, bases):
    """A full checkpoint with a chat template that marks the assistant's turns, as TRL wants it."""
    folder = tmp_path_factory.mktemp("generation")
    from transformers import AutoTokenizer

    llm = tiny_models.make_llm(folder / "llm", "qwen2", chat=True)
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.chat_template = GENERATION
    tokenizer.save_pretrained(llm)
    bridge = make_model(folder / "bridge", bases[0], llm)
    model, processor = load_checkpoint(str(bridge))
    model.save_pretrained(folder / "full")
    processor.save_pretrained(folder / "full")
    return folder / "full"


def our_loss(checkpoint, cache):
    """Loss per answer token of all training conversations of a cache, packed."""
    model, processor = load_checkpoint(str(checkpoint))
    data = open_split(FeatureCache.open(cache), "train", model, processor)
    batch = EvalBatches(data, PromptEncoder(processor), Layout(pad_token_id=0), 1000)[0]
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=build_attention_mask(batch, model.parts()["llm"]),
            logits_at=batch["predict_from"],
            use_cache=False,
            **batch["inputs"],
        ).logits
    return torch.nn.functional.cross_entropy(logits, batch["targets"]).item(), len(batch["targets"])


@pytest.mark.parametrize("form", ["messages", "completion"])
def test_the_loss_is_that_of_trl_on_the_same_rows(form, chat_checkpoint, chat_rows, dataset_dir, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is an extra: pip install blipren[trl]")
    from datasets import Dataset, Image, List
    from PIL import Image as PIL

    rows = [row for row in chat_rows if row["split"] == "train" and "image" in row]
    if form == "completion":  # one turn, which ends where the template ends an answer
        rows = [row for row in rows if len(row["messages"]) == 2]
    (tmp_path / "d").symlink_to(dataset_dir)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = shutil.copytree(dataset_dir, tmp_path / "data")
    (path / "chat.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    embed(EmbedSettings(
        model=str(chat_checkpoint), dataset=str(path / "chat.jsonl"), cache=str(tmp_path / "c"), dtype="float32", workers=0,
    ))  # fmt: skip
    ours, tokens = our_loss(chat_checkpoint, tmp_path / "c")

    def trl_row(row):
        names = row["image"] if isinstance(row["image"], list) else [row["image"]]
        images = [PIL.open(path / name).convert("RGB") for name in names]
        if form == "messages":
            return {"messages": row["messages"], "images": images}
        return {"prompt": row["messages"][:1], "completion": row["messages"][1:], "images": images}

    data = Dataset.from_list([trl_row(row) for row in rows]).cast_column("images", List(Image()))
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "run"), trust_remote_code=True, per_device_eval_batch_size=len(rows), max_length=None,
        report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, assistant_only_loss=form == "messages",
    )  # fmt: skip
    model, processor = load_checkpoint(str(chat_checkpoint))
    trainer = trl.SFTTrainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, processing_class=processor
    )
    theirs = trainer.evaluate()["eval_loss"]
    answers = sum(m["role"] == "assistant" for row in rows for m in row["messages"])
    assert tokens > answers
    assert ours == pytest.approx(theirs, rel=1e-5)
