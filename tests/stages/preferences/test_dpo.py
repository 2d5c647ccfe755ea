"""`blipren dpo`: learns preferences, resumes to the same bits, and two processes give what one gives."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from blipren.training.commands.dpo import DpoSettings
from blipren.training.engine.preference_settings import check_trl
from blipren.training.errors import UsageError, UserError
from blipren.training.evaluation.report.training import preference_lines
from blipren.training.stages.dpo import REFERENCE, dpo
from tests.stages.preferences.test_grpo import FIVE_KILLS
from tests.stages.test_processes import finish
from tests.stages.test_resume import run_with_kills, same_bits
from tests.stages.tools import events, fork_command, weights


@pytest.fixture
def settings(policy_dir, pair_cache, tmp_path):
    """Function from changes to settings of a run of a second or two."""

    def make(**changes) -> DpoSettings:
        values = dict(
            model=str(policy_dir),
            cache=str(pair_cache),
            out=str(tmp_path / "run"),
            max_steps=6,
            batch_size=8,
            learning_rate=3e-3,
            log_every=1,
            eval_every=3,
            save_every=3,
            device="cpu",
        )
        return DpoSettings(**values | changes)

    return make


def test_preferences_are_learned(settings, tmp_path, capsys):
    assert dpo(settings(max_steps=16, eval_every=16, learning_rate=2e-2)) == 0
    assert "done: 16 steps; best of validation, loss" in capsys.readouterr().out
    before, after = events(tmp_path / "run", "validation")
    assert before["loss"] == pytest.approx(0.6931, abs=1e-4) and before["rewards/margins"] == pytest.approx(
        0, abs=1e-5
    )
    assert after["loss"] < 0.6 and after["rewards/accuracies"] > 0.7 and after["rewards/margins"] > 0.1
    assert after["pairs"] == before["pairs"] == 16
    chosen, rejected = load_file(tmp_path / "run" / REFERENCE)["validation/0"].T
    assert before["chosen_likelier"] == (chosen > rejected).float().mean()
    shown = preference_lines(str(tmp_path / "run"))["pairs whose chosen answer the model finds likelier"]
    assert shown == f"{before['chosen_likelier']:.4f} before training, {after['chosen_likelier']:.4f} after"
    assert {"objective", "rewards/chosen", "logps/rejected", "entropy"} <= events(tmp_path / "run", "train")[0].keys()


@pytest.mark.parametrize("kills", [[(4, 0.01)], pytest.param(FIVE_KILLS, marks=pytest.mark.slow)], ids=len)
def test_kills_end_with_the_same_bits(settings, tmp_path, kills):
    """The reference is that of the model before training, also where the run goes on without its file."""
    never = settings(
        max_steps=9,
        eval_every=9,
        save_every=2,
        micro_batches=2,
        ema=0.9,
        llm_tuning="lora",
        workers=1,
        disable_dropout=False,
    )
    killed = DpoSettings(**never.__dict__ | {"out": str(tmp_path / "killed")})
    dpo(never)
    run_with_kills(killed, tmp_path / "killed", kills)
    same_bits(weights(tmp_path / "run"), weights(tmp_path / "killed"))
    text, other = (
        json.loads((tmp_path / out / "finished.json").read_text())["text_loss"] for out in ("run", "killed")
    )
    assert text == other and text["before"] != text["after"] > 0
    kept = load_file(tmp_path / "run" / REFERENCE)
    for name in ("finished.json", "model.safetensors", REFERENCE):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-9")
    assert dpo(never) == 0
    same_bits(weights(tmp_path / "run"), weights(tmp_path / "killed"))
    same_bits(kept, load_file(tmp_path / "run" / REFERENCE))


def test_two_processes_equal_one(settings, tmp_path):
    """Seven images in a step: the processes have different numbers of pairs."""
    one = settings(batch_size=7, micro_batches=2, max_steps=4)
    two = DpoSettings(**one.__dict__ | {"out": str(tmp_path / "two")})
    process = fork_command(two, processes=2)
    dpo(one)
    assert "2 processes" in finish(process)
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "two")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=2e-3, atol=2e-4)
    for kind, names in (("train", ("objective", "rewards/margins")), ("validation", ("loss", "rewards/accuracies"))):
        for name in names:
            values = [[e[name] for e in events(tmp_path / run, kind)] for run in ("run", "two")]
            assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-6), name


def test_what_is_wrong_is_said(settings, policy_cache, tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match="has no preferences: embed a data set with the columns prompt, chosen, rejected"
    ):
        dpo(settings(cache=str(policy_cache)))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"need TRL.*pip install blipren\[trl\]"):
        check_trl()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss_type": ["kto"]}, "loss_type has 'kto'"),
        ({"loss_weights": [1.0, 1.0]}, "2 numbers for 1 losses"),
        ({"ld_alpha": 2.0}, "ld_alpha is 2.0"),
        ({"loss_type": ["exo_pair"]}, "exo_pair needs label_smoothing"),
        ({"loss_type": ["robust"], "label_smoothing": 0.5}, "below 0.5"),
        ({"loss_type": ["aot"], "f_divergence_type": "js_divergence"}, "aot is none of them"),
        ({"loss_type": ["aot"], "use_weighting": True}, "does not go with aot"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(UsageError, match=message):
        DpoSettings(model="m", cache="c", out="o", **changes)


def test_one_cache_has_preferences_and_is_trained_on(settings, pair_cache, tmp_path):
    """`train` learns the chosen answers; a run of dpo over two caches draws by weight."""
    assert dpo(settings(cache=f"{pair_cache}=1,{pair_cache}=0.5", max_steps=2, eval_every=2)) == 0
    assert json.loads((tmp_path / "run" / "finished.json").read_text())["steps"] == 2
    tables = load_file(tmp_path / "run" / REFERENCE)
    assert torch.equal(tables["train/0"], tables["train/1"]) and (tables["train/0"] < 0).all()
