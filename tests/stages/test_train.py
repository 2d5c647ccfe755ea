"""`blipren train`: law 7, tuning, regularizers, validation, log, run folder."""

import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention
from transformers.models.llama.modeling_llama import LlamaAttention

from blipren import BliprenForConditionalGeneration, BliprenProcessor, modeling_blipren
from blipren.training.commands.train import TrainSettings
from blipren.training.data.batches.masks import shared_prefix_mask
from blipren.training.data.batches.training_data import CachedData
from blipren.training.engine import checkpoints
from blipren.training.engine import trained_parts as tuning
from blipren.training.engine.model_setup import set_attention
from blipren.training.errors import UsageError, UserError
from blipren.training.objectives.likelihood import answer_losses
from blipren.training.stages import train as caption
from tests import tiny_models
from tests.stages.tools import events, make_model, weights


@pytest.fixture(scope="module")
def one_run(model_dir, cache_dir, tmp_path_factory):
    """A finished run of twelve steps with LLM frozen, and the settings that it had."""
    out = tmp_path_factory.mktemp("one") / "run"
    settings = TrainSettings(
        model=str(model_dir), cache=str(cache_dir), out=str(out), max_steps=12, batch_size=8, learning_rate=5e-3,
        log_every=2, eval_every=4, generate_samples=2, max_new_tokens=6, device="cpu",
    )  # fmt: skip
    assert caption.train(settings) == 0
    return out, settings


def test_run_folder_holds_everything_and_loads(one_run):
    out, _ = one_run
    for name in ("settings.yaml", "environment.json", "log.jsonl", "curves.json", "curves.png", "finished.json"):
        assert (out / name).stat().st_size > 0, name
    model = BliprenForConditionalGeneration.from_pretrained(out)
    assert model.config.checkpoint_type == "full" or model.config.base_models
    train = events(out, "train")
    assert train[-1]["step"] == 12 and train[-1]["loss"] < train[0]["loss"]
    for name in ("learning_rate", "tokens_per_second", "images_per_second", "useful_tokens", "tflops", "grad_norm"):
        assert all(math.isfinite(e[name]) for e in train), name
    assert [e["step"] for e in events(out, "validation")] == [4, 8, 12]
    assert {e["images"] for e in events(out, "validation")} == {8}  # all of validation
    samples = events(out, "sample")
    assert {e["when"] for e in samples} == {"before", "during", "after"}
    assert len({e["image"] for e in samples}) == 2


def test_best_model_is_what_out_holds(one_run):
    out, _ = one_run
    best = min(events(out, "validation"), key=lambda e: e["loss"])
    kept = load_file(out / "checkpoints" / f"best-{best['step']}" / "trained.safetensors")
    saved = weights(out)
    assert kept.keys() == saved.keys() and all(torch.equal(kept[k], saved[k]) for k in kept)


def test_frozen_parts_are_bit_equal_and_no_bridge_weight_stands_still(one_run, model_dir):
    out, _ = one_run
    before = BliprenForConditionalGeneration.from_pretrained(model_dir).state_dict()
    after = BliprenForConditionalGeneration.from_pretrained(out).state_dict()
    for name in before:
        same = torch.equal(before[name], after[name])
        if "qformer" not in name and "projector" not in name:
            assert same, name
    still = [n for n in before if "qformer" in n and n.endswith("weight") and torch.equal(before[n], after[n])]
    assert not [n for n in still if "cross_attention_norm" not in n], still


def test_run_again_when_finished_does_nothing_and_other_settings_are_refused(one_run, capsys):
    out, settings = one_run
    assert caption.train(settings) == 0
    assert "is finished: 12 steps" in capsys.readouterr().out
    other = TrainSettings(**settings.__dict__ | {"learning_rate": 1e-3})
    with pytest.raises(UserError, match="holds a run with learning_rate 0.005, not 0.001"):
        caption.train(other)


def test_out_with_other_files_is_refused(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        caption.train(settings())


# ---- law 7 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"micro_batches": 4}, {"shared_prefix": False}, {"row_tokens": 40}, {"workers": 2}],
    ids=lambda c: next(iter(c)),
)
def test_layout_and_accumulation_do_not_change_training(settings, tmp_path, changes, deterministic_model):
    """Without dropout, the same images give the same weights to rounding, however a step is cut and laid out."""
    plain = settings(model=str(deterministic_model), keep_best="last", max_steps=3)
    other = settings(**{**plain.__dict__, "out": str(tmp_path / "other")} | changes)
    caption.train(plain)
    caption.train(other)
    a, b = weights(tmp_path / "run"), weights(tmp_path / "other")
    start = weights(deterministic_model)
    assert sum((a[k] - start[k]).norm() for k in a) > 0.1
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=2e-3, atol=2e-4)
    losses = [[e["loss"] for e in events(tmp_path / run, "train")] for run in ("run", "other")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_flex_attention_trains_to_the_same_weights(settings, tmp_path, deterministic_model, monkeypatch):
    """Uncompiled on the CPU, where torch refuses its backward pass and so do we: both refusals are taken out."""
    run = settings(model=str(deterministic_model), word_dropout=0.3)
    flex = type(run)(**run.__dict__ | {"out": str(tmp_path / "flex"), "attention": "flex_attention"})
    caption.train(run)
    with pytest.raises(UserError, match="cannot be trained on cpu"):
        caption.train(flex)
    seen, forward = set(), LlamaAttention.forward

    def watched(self, *args, **keywords):
        seen.add((self.config._attn_implementation, type(keywords["attention_mask"]).__name__))
        return forward(self, *args, **keywords)

    monkeypatch.setattr(LlamaAttention, "forward", watched)
    monkeypatch.setattr(caption, "set_attention", lambda model, name, device: set_attention(model, name, "cuda"))
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    with torch.compiler.set_stance("force_eager"):
        caption.train(flex)
    assert ("flex_attention", "BlockMask") in seen and ("flex_attention", "Tensor") not in seen
    ours, theirs = weights(tmp_path / "flex"), weights(tmp_path / "run")
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-3, atol=2e-4)
    losses = [[e["loss"] for e in events(tmp_path / name, "train")] for name in ("run", "flex")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- what stops it ------------------------------------------------------------------------------------------------


def test_nan_stops_before_the_update_and_names_the_images(settings, tmp_path, monkeypatch):
    run = settings(max_steps=9, save_every=2, log_every=1)
    original = CachedData.inputs

    def poisoned(self, images, seed):
        inputs = original(self, images, seed)
        if self.split == "train" and self.ids.index("7.png") in images:
            inputs["patch_features"][images.index(self.ids.index("7.png"))] = float("nan")
        return inputs

    monkeypatch.setattr(CachedData, "inputs", poisoned)
    with pytest.raises(UserError, match=r"loss is not finite at step (\d+).*7\.png") as caught:
        caption.train(run)
    step = int(str(caught.value).split("step ")[1].split(":")[0])
    for folder in checkpoints.list_checkpoints(tmp_path / "run" / "checkpoints"):
        assert checkpoints.step_of(folder) < step
        assert all(t.isfinite().all() for t in load_file(folder / "trained.safetensors").values())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rates": {"head": 1e-3}}, "a part 'head'"),
        ({"learning_rates": {"llm": "1e-3"}}, "with a point"),
        ({"merge_lora": True}, "merge_lora needs"),
        ({"feature_dropout": 1.0}, "below 1"),
        ({"train_vision": True}, "needs online"),
        ({"fused_loss": True, "label_smoothing": 0.1}, "leave one of them out"),
        ({"keep_best": "BLEU"}, "must be one of"),
    ],
)
def test_wrong_settings_are_refused(settings, changes, message):
    with pytest.raises(UsageError, match=message):
        settings(**changes)


def test_wrong_uses_have_one_clear_line(settings):
    with pytest.raises(UserError, match="no feature cache"):
        caption.train(settings(cache="nowhere"))
    with pytest.raises(UserError, match="nowhere"):
        caption.train(settings(model="nowhere"))
    with pytest.raises(UsageError, match="WEIGHT"):
        caption.train(settings(cache="a=x"))
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        caption.train(settings(precision="fp16"))
    with pytest.raises(UserError, match="cannot be cut into 8"):
        caption.train(settings(batch_size=4, micro_batches=8))
    with pytest.raises(UserError, match="nothing is trained"):
        caption.train(settings(train_connector=False))
    with pytest.raises(UserError, match="lora_targets has 'wq'"):
        caption.train(settings(llm_tuning="lora", lora_targets=["wq"]))


def test_deepspeed_that_cannot_work_is_refused(settings, tmp_path, monkeypatch):
    with monkeypatch.context() as launched:
        launched.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # what `accelerate launch --use_deepspeed` sets
        with pytest.raises(UserError, match="--deepspeed CONFIG"):
            caption.train(settings())
    config = tmp_path / "zero.json"
    with pytest.raises(UserError, match="needs torchrun"):
        caption.train(settings(deepspeed=str(config)))
    monkeypatch.setenv("RANK", "0")
    for text, said in {
        "": "cannot be read",
        '{"zero_optimization": {"stage": 3}}': "stage 3; it must be 1 or 2",
        '{"gradient_clipping": 0.5}': "has 'gradient_clipping', which --clip decides",
        '{"bf16": {"enabled": true}, "zero_optimization": {"stage": 2}}': "has 'bf16', which --precision decides",
    }.items():
        config.write_text(text)
        with pytest.raises(UserError, match=said):
            caption.train(settings(deepspeed=str(config)))
    with pytest.raises(UsageError, match="neither fsdp nor compile"):
        settings(deepspeed="x", fsdp=True)
    with pytest.raises(UsageError, match="llm_bits 8 cannot be sharded"):
        settings(llm_bits=8, fsdp=True)


# ---- tuning -------------------------------------------------------------------------------------------------------


def logits_of(model):
    torch.manual_seed(0)
    n = model.config.num_visual_tokens
    ids = torch.tensor([[model.config.image_token_id] * n + [5, 6, 7]])
    features = torch.randn(1, 16, model.config.vision_hidden_size)
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), patch_features=features).logits


def test_lora_saves_with_the_bridge_and_reloads(settings, tmp_path, model_dir):
    caption.train(settings(llm_tuning="lora", keep_best="last", learning_rates={"llm": 1e-2}))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert not [name for name in weights(tmp_path / "run") if "language_model" in name]
    before, after = (BliprenForConditionalGeneration.from_pretrained(p) for p in (model_dir, tmp_path / "run"))
    trained = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-6" / "trained.safetensors")
    state = after.state_dict()
    adapters = [n for n in trained if "lora_" in n]
    assert len(adapters) == 2 * 7 * 2  # two layers, seven linears, A and B
    assert all(torch.equal(trained[n], state[n]) for n in adapters)
    assert any(trained[n].abs().sum() > 0 for n in adapters if "lora_B" in n)
    assert not torch.equal(logits_of(before), logits_of(after))
    tuning.merge_lora(after)
    torch.testing.assert_close(
        logits_of(after),
        logits_of(BliprenForConditionalGeneration.from_pretrained(tmp_path / "run")),
        rtol=1e-4,
        atol=1e-5,
    )


def test_merged_lora_is_a_full_checkpoint_with_equal_logits(settings, tmp_path):
    caption.train(settings(llm_tuning="lora", keep_best="last", learning_rates={"llm": 1e-2}))
    caption.train(
        settings(llm_tuning="lora", keep_best="last", learning_rates={"llm": 1e-2}, full=True, merge_lora=True,
                 out=str(tmp_path / "merged"))
    )  # fmt: skip
    assert not (tmp_path / "merged" / "adapter").exists()
    models = [BliprenForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("run", "merged")]
    torch.testing.assert_close(*map(logits_of, models), rtol=1e-4, atol=1e-5)


def test_full_tuning_trains_the_llm_and_saves_everything(settings, tmp_path, model_dir):
    caption.train(settings(llm_tuning="full", keep_best="last", gradient_checkpointing=True))
    before, after = (
        BliprenForConditionalGeneration.from_pretrained(p).state_dict() for p in (model_dir, tmp_path / "run")
    )
    names = [n for n in before if "language_model.layers" in n and n.endswith("proj.weight")]
    assert names and all(not torch.equal(before[n], after[n]) for n in names)
    assert all(torch.equal(before[n], after[n]) for n in before if "vision_tower" in n)


def test_gradient_checkpointing_gives_the_same_weights(settings, tmp_path, deterministic_model, monkeypatch):
    values = dict(model=str(deterministic_model), max_steps=2, keep_best="last")
    recomputed, checkpoint = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda f, *a, **k: recomputed.append(f) or checkpoint(f, *a, **k)
    )
    caption.train(settings(**values))
    assert not recomputed
    caption.train(settings(**values, gradient_checkpointing=True, out=str(tmp_path / "other")))
    assert recomputed
    for name, tensor in weights(tmp_path / "run").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "other")[name])


def test_frozen_qformer_and_learning_rate_groups(model_dir, settings):
    model = BliprenForConditionalGeneration.from_pretrained(model_dir)
    tuning.choose_trained(model, settings(train_qformer=False))
    model.train()
    assert not any(p.requires_grad for p in model.model.qformer.parameters())
    assert not any(m.training for m in model.model.qformer.modules())
    assert all(p.requires_grad for p in model.model.projector.parameters())

    s = settings(learning_rates={"projector": 7e-3, "llm": 1e-5}, llm_tuning="full")
    tuning.choose_trained(model, s)
    groups = tuning.parameter_groups(model, s)
    rates = {g["part"]: g["lr"] for g in groups}
    assert rates == {"qformer": 3e-3, "projector": 7e-3, "llm": 1e-5}
    named = {name: g for g in groups for name in g["names"]}
    assert set(named) == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, group in named.items():
        bare = name.endswith("bias") or "norm" in name or "query_tokens" in name or "embed" in name
        assert group["weight_decay"] == (0.0 if bare else s.weight_decay), name


# ---- regularisers -------------------------------------------------------------------------------------------------


REGULARISERS = {
    "word_dropout": 0.5, "feature_dropout": 0.5, "feature_noise": 1.0, "label_smoothing": 0.3, "ema": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def plain_two_steps(cache_dir, deterministic_model, tmp_path_factory):
    """Function that trains two steps from the same start with some changes, and returns the run folder."""
    folder = tmp_path_factory.mktemp("two-steps")

    def run(name, **changes):
        values = dict(model=str(deterministic_model), cache=str(cache_dir), out=str(folder / name), max_steps=2)
        values |= dict(batch_size=8, eval_every=2, keep_best="last", generate_samples=0, device="cpu")
        if not (folder / name).exists():
            caption.train(TrainSettings(**values | {"learning_rate": 1e-2} | changes))
        return folder / name

    return run


@pytest.mark.parametrize("name", REGULARISERS)
def test_regularisers_change_training(plain_two_steps, name):
    a, b = weights(plain_two_steps("plain")), weights(plain_two_steps(name, **{name: REGULARISERS[name]}))
    assert any(not torch.equal(a[k], b[k]) for k in a)


def test_average_of_the_weights_is_kept(plain_two_steps, deterministic_model):
    """Two steps from w0 through w1 to w2: decays 1/10 and 2/11, the warm-up's, below the 0.5 that was asked for."""
    averaged = weights(plain_two_steps("ema", ema=0.5))
    start = {f"{n}": t for n, t in weights(deterministic_model).items()}
    first = load_file(plain_two_steps("first", save_every=1) / "checkpoints" / "checkpoint-1" / "trained.safetensors")
    last = weights(plain_two_steps("plain"))
    for name, tensor in averaged.items():
        one = start[name].lerp(first[name], 0.9)
        torch.testing.assert_close(tensor, one.lerp(last[name], 9 / 11), rtol=1e-5, atol=1e-6)


def test_regularisers_leave_validation_alone(plain_two_steps):
    still = {"learning_rate": 1e-30, "weight_decay": 0.0}
    folders = plain_two_steps("still", **still), plain_two_steps("all-still", **still, **REGULARISERS)
    losses = [events(folder, "validation")[-1]["loss"] for folder in folders]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_word_dropout_hides_words_from_others_only():
    block, segment = torch.tensor([[0, 0, 0, 0, -1]]), torch.tensor([[0, 1, 1, 1, 0]])
    mask = shared_prefix_mask(block, segment, torch.float32)[0, 0]
    unseen = torch.tensor([[False, False, True, False, False]])
    hidden = shared_prefix_mask(block, segment, torch.float32, unseen)[0, 0]
    assert hidden[2, 2] == 0 and hidden[3, 2] < -1e30 and mask[3, 2] == 0
    assert torch.equal(hidden[:, [0, 1, 3, 4]], mask[:, [0, 1, 3, 4]])


def test_answer_losses_equal_torch():
    logits, targets = torch.randn(7, 11), torch.randint(11, (7,))
    nll, objective = answer_losses(logits, targets, 0.2)
    cross_entropy = torch.nn.functional.cross_entropy
    torch.testing.assert_close(nll, cross_entropy(logits, targets, reduction="sum"))
    torch.testing.assert_close(objective, cross_entropy(logits, targets, reduction="sum", label_smoothing=0.2))


# ---- arithmetic and trackers --------------------------------------------------------------------------------------


def test_bf16_trains_and_leaves_frozen_parts_as_they_were(plain_two_steps, deterministic_model):
    folder = plain_two_steps("bf16", precision="bf16")
    plain = plain_two_steps("plain")
    losses = [[e["loss"] for e in events(f, "train")] for f in (folder, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2) and losses[0] != losses[1]
    before, after = (
        BliprenForConditionalGeneration.from_pretrained(p).state_dict() for p in (deterministic_model, folder)
    )
    assert all(after[n].dtype == before[n].dtype for n in before)
    assert all(torch.equal(before[n], after[n]) for n in before if "language_model" in n)


def test_fused_loss_trains_to_the_same_weights(plain_two_steps, monkeypatch):
    monkeypatch.setattr(modeling_blipren, "LOSS_CHUNK", 3)  # several pieces of the few tokens here
    fused, plain = plain_two_steps("fused", fused_loss=True), plain_two_steps("plain")
    for kind in ("train", "validation"):
        losses = [[e["loss"] for e in events(folder, kind)] for folder in (fused, plain)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(fused)[name], tensor, rtol=1e-3, atol=1e-5)


def test_fused_loss_in_bf16(plain_two_steps):
    folders = (
        plain_two_steps("fused-bf16", fused_loss=True, precision="bf16"),
        plain_two_steps("bf16", precision="bf16"),
    )
    losses = [[e["loss"] for e in events(folder, "train")] for folder in folders]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_fused_loss_is_refused_where_logits_are_capped(plain_two_steps, deterministic_model, tmp_path):
    capped = tmp_path / "capped"
    model = BliprenForConditionalGeneration.from_pretrained(deterministic_model)
    model.config.text_config.final_logit_softcapping = 30.0
    model.save_pretrained(capped)
    BliprenProcessor.from_pretrained(deterministic_model).save_pretrained(capped)
    with pytest.raises(UserError, match="neither scaled nor capped"):
        plain_two_steps("capped", model=str(capped), fused_loss=True)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_model_trains_to_the_same_loss(plain_two_steps, backend):
    counters.clear()
    compiled = plain_two_steps(f"compiled-{backend}", compile=True, compile_backend=backend)
    assert counters["stats"]["unique_graphs"] > 0
    losses = [[e["loss"] for e in events(f, "validation")] for f in (plain_two_steps("plain"), compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_trackers_of_the_trainer_get_the_log(plain_two_steps, monkeypatch, tmp_path):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    plain_two_steps("tracked", report_to=["tensorboard"])
    (written,) = tmp_path.rglob("events.out.tfevents*")
    content = written.read_bytes()
    for name in (b"train/loss", b"train/tokens_per_second", b"eval/loss"):
        assert name in content


@pytest.mark.parametrize("command", ["train", "align"])
def test_a_tracker_that_is_not_installed_is_one_line_before_torch_is_loaded(command, tmp_path):
    code = f"""
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "wandb" else found(name, *more)
from blipren.training.cli import main
status = main(["{command}", "model", "cache", "out", "--report-to", "wandb"])
assert "torch" not in sys.modules and "transformers" not in sys.modules
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line == (
        f"blipren {command}: report_to wandb needs the package wandb, which is not installed: pip install wandb"
    )
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_is_refused(settings):
    with pytest.raises(UsageError, match="report_to has 'comet'; trackers are: trackio, tensorboard, wandb, mlflow"):
        settings(report_to=["comet"])


def test_a_bar_is_drawn_where_there_is_a_terminal(plain_two_steps, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    plain_two_steps("with-bar", log_every=1)
    error = capsys.readouterr().err
    assert "2/2" in error and "images/s" in error and "tokens/s" in error


@pytest.mark.parametrize("tuning_mode, bits", [("frozen", 8), ("frozen", 4), ("lora", 4)])
def test_bridge_trains_beside_a_language_model_in_few_bits(settings, tmp_path, tuning_mode, bits, bases):
    pytest.importorskip("bitsandbytes")
    llm = tiny_models.make_llm(tmp_path / "llm", hidden_size=64, intermediate_size=128)  # a block of 4 bits is 64 wide
    start = make_model(tmp_path / "start", bases[0], llm)
    run = settings(model=str(start), llm_tuning=tuning_mode, max_steps=6, learning_rate=1e-2, log_every=1)
    few = type(run)(**run.__dict__ | {"llm_bits": bits, "out": str(tmp_path / "few")})
    caption.train(run)
    caption.train(few)
    losses, few_losses = ([e["loss"] for e in events(tmp_path / name, "train")] for name in ("run", "few"))
    assert few_losses[0] == pytest.approx(losses[0], rel=0.05) and few_losses[0] != losses[0]  # rounded, and really so
    assert few_losses[-1] < few_losses[0]
    assert events(tmp_path / "few", "train")[0]["grad_norm"] == pytest.approx(
        events(tmp_path / "run", "train")[0]["grad_norm"], rel=0.3
    )  # it reaches the bridge
    model = BliprenForConditionalGeneration.from_pretrained(tmp_path / "few")
    before = BliprenForConditionalGeneration.from_pretrained(start).state_dict()
    after = {n.replace(".base_layer.", "."): t for n, t in model.state_dict().items()}
    assert all(torch.equal(before[n], after[n]) for n in before if "language_model" in n)


@pytest.mark.parametrize("tuning_mode, projector", [("frozen", "mlp"), ("lora", "mlp"), ("frozen", "moe")])
def test_a_language_model_that_lets_no_gradient_through_is_refused(
    settings, tmp_path, bases, monkeypatch, tuning_mode, projector
):
    def without_gradient(model, precision):
        language_model = model.parts()["llm"]
        language_model.forward = torch.no_grad()(language_model.forward)

    monkeypatch.setattr(caption, "set_precision", without_gradient)
    with pytest.raises(UserError, match="no gradient reaches the projector"):
        caption.train(
            settings(model=str(make_model(tmp_path / "m", *bases, projector=projector)), llm_tuning=tuning_mode)
        )


def test_few_bits_cannot_be_trained_fully(settings):
    with pytest.raises(UsageError, match="cannot be trained fully"):
        settings(llm_bits=4, llm_tuning="full")
