"""The rewards of a run, from its settings."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

from blipren.training.commands.grpo import RewardSettings
from blipren.training.errors import UserError, one_line
from blipren.training.evaluation.judges import find_judge, installed_judges
from blipren.training.objectives.rewards.answers import choice, vqa
from blipren.training.objectives.rewards.boxes import box
from blipren.training.objectives.rewards.cider import CiderReward
from blipren.training.objectives.rewards.form import LengthReward, PatternReward
from blipren.training.objectives.rewards.pictures import hallucination, scene


@dataclass
class Completions:
    """Completions and what rewards may look at, as lists: the keywords of a reward function."""

    prompts: list[str | None]
    completions: list[str]
    completion_ids: list[list[int]]
    references: list[list[str]]
    image_ids: list[str]
    facts: list[Mapping]
    ended: list[bool]

    def __len__(self) -> int:
        return len(self.completions)

    def columns(self) -> dict[str, list]:
        """Return the lists by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Reward:
    """A reward function, its name and its weight."""

    name: str
    weight: float
    function: Callable[..., list[float | None]]

    def __call__(self, rows: Completions) -> list[float | None]:
        """Return the reward of each completion.

        Raises:
            UserError: the function fails, or returns anything but a number or None for each.
        """
        try:
            found = list(self.function(**rows.columns()))
        except Exception as error:  # a user's function may raise anything
            raise UserError(f"reward {self.name} failed: {type(error).__name__}: {one_line(error)}") from error
        if len(found) != len(rows):
            raise UserError(
                f"reward {self.name} gave {len(found)} numbers for {len(rows)} completions; it gives one each"
            )
        if wrong := [value for value in found if not isinstance(value, int | float | None)]:
            raise UserError(f"reward {self.name} gave {wrong[0]!r}; a reward is a number or None")
        return [None if value is None else float(value) for value in found]


def zero_if_cut(function: Callable[..., list[float | None]]) -> Callable[..., list[float | None]]:
    """Return a reward function that gives at most 0 to a completion that was cut off, however good its beginning."""

    def reward(*, ended: Sequence[bool], **columns) -> list[float | None]:
        found = function(ended=ended, **columns)
        return [value if whole or value is None else min(value, 0.0) for value, whole in zip(found, ended)]

    return reward


def load_function(spec: str) -> Callable[..., list[float | None]]:
    """Return the function that `module:function` names. Raises `UserError` if it cannot be imported."""
    module, _, name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"reward {spec} cannot be imported: {one_line(error)}") from error


def build_rewards(
    settings: RewardSettings,
    references: dict[str, list[str]],
    others: dict[str, list[str]],
    facts: Mapping[str, Mapping],
) -> list[Reward]:
    """Return the rewards in the order of the settings.

    Args:
        references: captions of each training image, from which CIDEr-D takes its document frequencies.
        others: captions of the validation images.
        facts: of each image.

    Raises:
        UserError: there is nothing that a reward could judge by, or a function cannot be imported.
    """
    if "cider" in settings.rewards and len(references) < 2:
        raise UserError(f"reward cider needs captions of two images or more; the cache has those of {len(references)}")
    if "scene" in settings.rewards and find_judge(facts.values()) is None:
        raise UserError(
            f"reward scene needs the content of the pictures, and {settings.facts}/metadata.jsonl has no column of an "
            f"installed judge: {', '.join(installed_judges())}"
        )
    weights = settings.reward_weights or [1.0] * len(settings.rewards)
    rewards = []
    for name, weight in zip(settings.rewards, weights):
        if ":" in name:
            function = load_function(name)
        elif name == "cider":
            function = zero_if_cut(CiderReward(references, others).reward)
        elif name == "format":
            function = PatternReward(settings.format_pattern)
        elif name == "length":
            function = LengthReward(settings.length_limit)
        else:
            function = zero_if_cut(
                {"vqa": vqa, "choice": choice, "box": box, "scene": scene, "hallucination": hallucination}[name]
            )
        rewards.append(Reward(name, weight, function))
    return rewards
