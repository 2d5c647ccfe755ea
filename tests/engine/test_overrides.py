"""The private methods of transformers' Trainer that are overridden or called are where they were, and in one file."""

import inspect

import pytest
from transformers import Trainer

from blipren.training.engine.trainer.stage_trainer import StageTrainer
from blipren.training.engine.trainer.transformers_overrides import TrainerOverrides
from blipren.training.stages.align import AlignTrainer
from blipren.training.stages.train import LikelihoodTrainer

CALLED = {"_prepare_inputs": ["self", "inputs"], "_save_scaler": ["self", "output_dir"]}


def private_overrides(cls: type) -> list[str]:
    """Return the private methods that a class itself defines and that the Trainer has, too."""
    return [
        name for name in vars(cls) if name.startswith("_") and not name.startswith("__") and hasattr(Trainer, name)
    ]


def moved_methods(trainer: type) -> list[str]:
    """Return a line for each private method that we need and that `trainer` does not have, or has in another form."""
    wanted = {name: list(inspect.signature(vars(TrainerOverrides)[name]).parameters) for name in OVERRIDDEN} | CALLED
    lines = []
    for name, ours in wanted.items():
        if not hasattr(trainer, name):
            lines.append(
                f"Trainer.{name} is gone: see what took its place, and change engine/trainer/transformers_overrides.py"
            )
        elif (theirs := list(inspect.signature(getattr(trainer, name)).parameters)) != ours:
            lines.append(
                f"Trainer.{name} takes {theirs} now, not {ours}: change engine/trainer/transformers_overrides.py"
            )
    return lines


OVERRIDDEN = [name for name in vars(TrainerOverrides) if name.startswith("_") and not name.startswith("__")]


def test_the_installed_trainer_has_every_method_as_it_is_overridden():
    assert len(OVERRIDDEN) >= 9
    assert moved_methods(Trainer) == []


@pytest.mark.parametrize("name", [*OVERRIDDEN, *CALLED])
def test_a_method_that_is_renamed_is_named(name, monkeypatch):
    original = getattr(Trainer, name)
    monkeypatch.delattr(Trainer, name)
    monkeypatch.setattr(Trainer, f"{name}_in_a_new_way", original, raising=False)
    assert moved_methods(Trainer) == [
        f"Trainer.{name} is gone: see what took its place, and change engine/trainer/transformers_overrides.py"
    ]


def test_a_method_with_other_arguments_is_named(monkeypatch):
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda self, model: None)
    (line,) = moved_methods(Trainer)
    assert line.startswith("Trainer._save_checkpoint takes ['self', 'model'] now, not ['self', 'model', 'trial']")


@pytest.mark.parametrize("cls", [StageTrainer, AlignTrainer, LikelihoodTrainer])
def test_no_other_class_overrides_a_private_method(cls):
    assert private_overrides(cls) == []
    assert private_overrides(TrainerOverrides) == OVERRIDDEN
