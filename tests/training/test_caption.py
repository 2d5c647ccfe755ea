"""`blipren train`: law 7, tuning, regularisers, validation, log, run folder."""

import math

import pytest
import torch
from safetensors.torch import load_file

from blipren import BliprenForConditionalGeneration
from blipren.training import caption
from blipren.training.errors import UserError
from blipren.training.settings import TrainSettings
from tests.tiny_models import QFORMER
from tests.training.tools import events, make_model, weights


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


@pytest.fixture(scope="module")
def deterministic_model(tmp_path_factory, bases):
    qformer = QFORMER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return make_model(
        tmp_path_factory.mktemp("deterministic") / "model",
        *bases,
        qformer=qformer,
        projector_options={"projector_dropout": 0.0},
    )
