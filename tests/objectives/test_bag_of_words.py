"""Bag of words: the targets are shares of answers, the head serves training alone."""

import json
from pathlib import Path

import pytest
import torch

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.data.batches.training_data import CachedData
from blipren.training.data.cache import FeatureCache
from blipren.training.errors import UserError
from blipren.training.objectives.experiments.bag_of_words import WordTargets
from blipren.training.stages.train import train
from tests.stages.tools import events


def test_targets_are_the_shares_of_answers_that_hold_a_token(model_dir, cache_dir):
    model = BliprenForConditionalGeneration.from_pretrained(model_dir)
    processor = BliprenProcessor.from_pretrained(model_dir)
    source = CachedData(FeatureCache.open(cache_dir), "train", model, processor)
    words = WordTargets([source], processor)
    answers = [ids for _, ids in source.texts.answers(1)]
    row = words.targets({"ids": [source.ids[1]]})[0]
    assert row.shape == (len(processor.tokenizer),) and row[processor.answer_end_id] == 1
    for token in {t for ids in answers for t in ids}:
        torch.testing.assert_close(row[token].item(), sum(token in ids for ids in answers) / len(answers))
    assert row.sum() > 0 and ((row > 0) <= torch.isin(torch.arange(len(row)), torch.tensor(sum(answers, [])))).all()


def test_words_alone_train_the_bridge_and_leave_no_head(settings, capsys):
    run = settings(
        max_steps=60,
        log_every=10,
        eval_every=60,
        learning_rate=1e-2,
        likelihood_weight=0.0,
        experiments={"bag_of_words": {"weight": 1.0}},
        keep_best="last",
    )
    assert train(run) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 7 and all("objective " in line and "words_loss " in line for line in lines)
    assert not any("loss 0.0000" in line for line in lines)
    assert not any("loss" in event for event in events(Path(run.out), "train"))
    objective = [event["objective"] for event in events(Path(run.out), "train")]
    assert len(objective) == 7 and sum(objective[-2:]) < 0.9 * sum(objective[:2])
    again = BliprenForConditionalGeneration.from_pretrained(run.out)
    assert not hasattr(again, "words_head")
    assert json.loads((Path(run.out) / "config.json").read_text())["checkpoint_type"] == "bridge"


def test_words_alone_on_two_processes_are_refused(settings, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="there are 2"):
        train(settings(likelihood_weight=0.0, experiments={"bag_of_words": {}}))
