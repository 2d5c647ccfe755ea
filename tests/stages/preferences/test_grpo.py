"""`blipren grpo`: runs, learns, resumes to the same bits, and two processes give what one gives."""

import json
import shutil

import pytest
import torch

from blipren import BliprenForConditionalGeneration
from blipren.training.commands.grpo import GrpoSettings
from blipren.training.errors import UserError
from blipren.training.stages.grpo import grpo
from tests.stages.test_processes import finish
from tests.stages.test_resume import run_with_kills, same_bits
from tests.stages.tools import events, fork_command, weights


def many_e(completions, **columns):
    """The share of a letter: every model can learn to say it."""
    return [text.count("e") / max(len(text), 1) for text in completions]


@pytest.fixture
def settings(policy_dir, policy_cache, tmp_path):
    """Function from changes to settings of a run of a second or two."""

    def make(**changes) -> GrpoSettings:
        values = dict(
            model=str(policy_dir),
            cache=str(policy_cache),
            out=str(tmp_path / "run"),
            rewards=["cider", "vqa"],
            max_steps=6,
            batch_size=8,
            num_generations=4,
            max_completion_length=6,
            learning_rate=3e-3,
            log_every=1,
            eval_every=3,
            save_every=3,
            generate_samples=1,
            max_new_tokens=5,
            device="cpu",
        )
        return GrpoSettings(**values | changes)

    return make


def test_a_reward_is_learned(settings, policy_dir, tmp_path, capsys):
    rewards = [f"{__name__}:many_e", "length"]
    run = settings(
        rewards=rewards,
        reward_weights=[1.0, 0.1],
        length_limit=9,
        max_steps=16,
        eval_every=16,
        llm_tuning="full",
        learning_rate=1e-2,
        prompts_per_image=1,
        num_generations=8,
    )
    assert grpo(run) == 0
    output = capsys.readouterr().out
    assert "captions before training" in output and "done: 16 steps; best of validation, reward" in output
    steps = events(tmp_path / "run", "train")
    first, last = (sum(e["rewards/" + rewards[0] + "/mean"] for e in part) / 5 for part in (steps[:5], steps[-5:]))
    assert last > 2 * first
    text = json.loads((tmp_path / "run" / "finished.json").read_text())["text_loss"]
    assert text["before"] == events(tmp_path / "run", "text")[0]["loss"] != text["after"] > 0
    before, after = events(tmp_path / "run", "validation")
    assert (before["step"], after["step"]) == (0, 16) and after["reward"] > before["reward"]
    assert {"completions/mean_length", "completions/clipped_ratio", "entropy", "reward_std"} <= steps[0].keys()
    assert "kl" not in steps[0]
    trained = BliprenForConditionalGeneration.from_pretrained(tmp_path / "run")
    start = BliprenForConditionalGeneration.from_pretrained(policy_dir)
    for name, parameter in start.named_parameters():
        if ".vision_tower." in name:
            assert torch.equal(parameter, trained.get_parameter(name)), "frozen parts are what they were"


def test_only_what_a_reward_applies_to_is_sampled(settings, tmp_path):
    assert grpo(settings(rewards=["vqa"], max_steps=1, eval_every=1)) == 0
    (step,) = events(tmp_path / "run", "train")
    assert step["frac_reward_zero_std"] <= 1 and "rewards/vqa/mean" in step
    assert events(tmp_path / "run", "validation")[0].keys() >= {"reward", "rewards/vqa"}


FIVE_KILLS = [(1, 0.0), (3, 0.02), (4, 0.011), (6, 0.007), (8, 0.03)]


@pytest.mark.parametrize("kills", [[(4, 0.01)], pytest.param(FIVE_KILLS, marks=pytest.mark.slow)], ids=len)
def test_kills_end_with_the_same_bits(settings, tmp_path, kills):
    """With everything that draws: prompts, completions, dropout; with a reference and an average, in two micro-batches."""
    never = settings(
        max_steps=9, eval_every=9, save_every=2, micro_batches=2, beta=0.1, ema=0.9, prompts_per_image=1,
        disable_dropout=False, workers=1, llm_tuning="lora",
    )  # fmt: skip
    killed = GrpoSettings(**never.__dict__ | {"out": str(tmp_path / "killed")})
    grpo(never)
    run_with_kills(killed, tmp_path / "killed", kills)
    same_bits(weights(tmp_path / "run"), weights(tmp_path / "killed"))
    assert [e["reward"] for e in events(tmp_path / "run", "train")] == [
        e["reward"] for e in events(tmp_path / "killed", "train")
    ]


def test_two_processes_equal_one(settings, tmp_path):
    """Seven images in a step: the processes have different numbers of completions."""
    one = settings(batch_size=7, micro_batches=2, beta=0.1, scale_rewards="batch", loss_type="grpo", max_steps=4)
    two = GrpoSettings(**one.__dict__ | {"out": str(tmp_path / "two")})
    process = fork_command(two, processes=2)
    grpo(one)
    assert "2 processes" in finish(process)

    def same():
        ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "two")
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=2e-3, atol=2e-4)

    same()
    for name in ("reward", "kl", "completions/mean_length"):
        values = [[e[name] for e in events(tmp_path / run, "train")] for run in ("run", "two")]
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-6), name
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "checkpoint-4")  # as if killed behind step 3
    for name in ("finished.json", "model.safetensors"):
        (tmp_path / "two" / name).unlink()
    grpo(two)  # what two processes wrote, one takes up
    same()


def test_what_is_wrong_is_said(settings, tmp_path, dataset_dir):
    with pytest.raises(UserError, match="no column of an installed judge"):
        grpo(settings(rewards=["scene"], facts=str(dataset_dir)))
    with pytest.raises(UserError, match="reward tests:nothing cannot be imported"):
        grpo(settings(rewards=["tests:nothing"]))
    assert not (tmp_path / "run").exists(), "a run that cannot begin leaves nothing"


def test_the_summary_says_what_was_kept(settings, tmp_path):
    assert grpo(settings(max_steps=2, eval_every=1, keep_best="CIDEr")) == 0
    summary = json.loads((tmp_path / "run" / "finished.json").read_text())
    assert summary["steps"] == 2 and summary["CIDEr"] >= 0
