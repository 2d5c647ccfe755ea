"""The reward is CIDEr-D; runs with a reward, alone and beside likelihood."""

from pathlib import Path

import pytest
from pycocoevalcap.cider.cider_scorer import CiderScorer

from blipren.training.errors import UsageError
from blipren.training.evaluation.metrics.tokenizer import tokenize
from blipren.training.objectives.rewards.cider import CiderReward
from blipren.training.stages.train import train
from tests.stages.tools import events

REFERENCES = {
    "a": ["A black dog runs on the grass.", "A dog is running through a green field.", "The dog runs."],
    "b": ["Two children play with a red ball.", "Kids playing on the beach with a ball."],
    "c": ["A man in a blue shirt rides a bicycle.", "A cyclist on the street."],
}
CAPTIONS = {"a": "A dog runs on the green grass.", "b": "A man rides a red bicycle.", "c": "a a a a"}


def test_the_reward_is_pycocoevalcaps_cider_d():
    scorer = CiderScorer()
    for image, references in REFERENCES.items():
        scorer += (tokenize([CAPTIONS[image]], "python")[0], tokenize(references, "python"))
    _, expected = scorer.compute_score()
    found = CiderReward(REFERENCES)(list(CAPTIONS), list(CAPTIONS.values()))
    assert found == pytest.approx(expected.tolist(), abs=1e-9) and found[0] > 1 > found[2]


def test_rewards_alone_train_and_are_logged(settings, monkeypatch):
    """With the share of vowels as the reward, and no likelihood beside it."""

    def vowels(self, images, captions):
        return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in captions]

    monkeypatch.setattr(CiderReward, "__call__", vowels)
    run = settings(
        max_steps=60,
        eval_every=60,
        log_every=10,
        llm_tuning="full",  # a random language model hardly listens to the bridge
        learning_rate=3e-3,
        likelihood_weight=0.0,
        experiments={"self_critical": {"temperature": 1.0, "max_tokens": 6}},
        keep_best="last",
    )
    monkeypatch.setattr(
        "blipren.training.objectives.experiments.self_critical.ENDED_ONLY", False
    )  # a random model hardly ever ends
    assert train(run) == 0
    rewards = [event["reward"] for event in events(Path(run.out), "train")]
    assert len(rewards) == 7 and sum(rewards[-2:]) > 1.2 * sum(rewards[:2])


def test_reward_and_likelihood_together_and_padded_rows(settings, tmp_path):
    for shared in (True, False):
        run = settings(
            out=str(tmp_path / f"run-{shared}"),
            shared_prefix=shared,
            experiments={"self_critical": {"weight": 0.5, "max_tokens": 4}},
        )
        assert train(run) == 0
        lines = events(Path(run.out), "train")
        assert all(0 <= line["reward"] <= 10 and line["loss"] > 0 for line in lines)


@pytest.mark.parametrize(
    "own, changes, message",
    [
        ({"samples": 1}, {}, "samples is 1; it must be at least 2"),
        ({"temperature": 0.0}, {}, "temperature is 0.0; it must be above 0"),
        ({"weight": -1.0}, {}, "weight is -1.0"),
        ({"sample": 3}, {}, "has a setting 'sample'; its settings are: weight, samples, temperature, max_tokens"),
        ({}, {"online": True}, "need a feature cache"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, own, changes, message):
    with pytest.raises(UsageError, match=message):
        settings(experiments={"self_critical": own}, **changes)
