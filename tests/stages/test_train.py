"""`blipren train`: law 7, what stops a run, run folder, trackers."""

import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import flex_attention
from transformers.models.llama.modeling_llama import LlamaAttention

from blipren import BliprenForConditionalGeneration
from blipren.training.commands.train import TrainSettings
from blipren.training.data.batches.training_data import CachedData
from blipren.training.engine import checkpoints
from blipren.training.engine.model_setup import set_attention
from blipren.training.errors import UsageError, UserError
from blipren.training.stages import train as caption
from tests.stages.tools import events, weights


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
        ({"optimizer": "muon", "fsdp": True}, "needs whole matrices"),
        ({"optimizer": "muon", "train_connector": False, "llm_tuning": "lora"}, "train_connector is off"),
        ({"muon_learning_rate": 0.0}, "above 0"),
    ],
)
def test_wrong_settings_are_refused(settings, changes, message):
    with pytest.raises(UsageError, match=message):
        settings(**changes)


def test_wrong_uses_have_one_clear_line(settings):
    with pytest.raises(UserError, match="nowhere is not a feature cache"):
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


# ---- trackers and the bar -----------------------------------------------------------------------------------------


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
