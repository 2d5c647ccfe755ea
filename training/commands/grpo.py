"""Reward what the model says: GRPO through TRL, on cached features."""

import re
from dataclasses import dataclass, field

from blipren.training.arguments import check_cache, check_checkpoint
from blipren.training.engine.preference_settings import PackedBatchSettings, SpeedSettings, check_trl
from blipren.training.engine.settings import (
    CheckpointSettings,
    GeneratedCaptionSettings,
    HardwareSettings,
    OptimizerSettings,
    TrainedPartsSettings,
    check_above_zero,
    check_at_least_one,
)
from blipren.training.errors import UsageError, UserError
from blipren.training.settings import Settings, choice, positional

CAPTION_REWARDS, QUESTION_REWARDS = {"cider", "scene", "hallucination"}, {"vqa", "choice", "box"}
REWARDS = ("cider", "vqa", "choice", "box", "scene", "hallucination", "format", "length")


@dataclass(kw_only=True)
class RewardSettings(Settings):
    """Rewards."""

    rewards: list[str] = field(default_factory=list)
    """Rewards that are added: cider (captions, CIDEr-D), vqa (answers, VQA accuracy), choice (the right option), box
    (intersection over union of boxes, matched one to one), scene (a caption that is true, for pictures whose content is
    known), hallucination (share of named objects that are there), format (a pattern), length (at most so many words), or a
    function of yours as module:function."""
    reward_weights: list[float] = field(default_factory=list)
    """Weight of each reward; 1 by default."""
    facts: str | None = None
    """Folder whose metadata.jsonl has what scene and hallucination judge by, for the images of the cache."""
    format_pattern: str | None = None
    """Regular expression that format wants a whole completion to match."""
    length_limit: int | None = None
    """Words of a completion above which length gives less than 1."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least_one(self, "length_limit")
        if not self.rewards:
            raise UsageError(f"needs --rewards: one or more of {', '.join(REWARDS)}, or module:function")
        for name in self.rewards:
            if name not in REWARDS and not re.fullmatch(r"[\w.]+:\w+", name):
                raise UsageError(f"rewards has {name!r}; rewards are {', '.join(REWARDS)}, or module:function")
        if len(set(self.rewards)) != len(self.rewards):
            raise UsageError(f"rewards names one twice: {' '.join(self.rewards)}; give it a weight instead")
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise UsageError(f"reward_weights has {len(self.reward_weights)} numbers for {len(self.rewards)} rewards")
        for reward, setting in (("format", "format_pattern"), ("length", "length_limit"), ("scene", "facts")):
            if reward in self.rewards and getattr(self, setting) is None:
                raise UsageError(f"reward {reward} needs {setting}")
        try:
            re.compile(self.format_pattern or "")
        except re.error as error:
            raise UsageError(f"format_pattern {self.format_pattern!r} is no regular expression: {error}") from error

    def prompt_kinds(self) -> set[str]:
        """Return which prompts the rewards are of: `captions`, `questions` or both."""
        kinds = set()
        for name in self.rewards:
            kinds |= {"captions"} if name not in QUESTION_REWARDS else set()
            kinds |= {"questions"} if name not in CAPTION_REWARDS else set()
        return kinds


@dataclass(kw_only=True)
class PolicySettings(Settings):
    """Completions and the loss, by TRL's names (GRPOConfig)."""

    num_generations: int = 8
    """Completions sampled of each prompt; their rewards are compared with each other."""
    max_completion_length: int = 64
    """Most tokens of a completion. One that has not ended by then gets nothing from the rewards of its content."""
    temperature: float = 1.0
    """Temperature of sampling and of the log-probabilities."""
    loss_type: str = choice("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "luspo", "sapo", "vespo", default="dapo")
    """TRL's loss: how tokens and completions are averaged."""
    beta: float = 0.0
    """Weight of the KL divergence from the model before training; 0 keeps no reference."""
    scale_rewards: str = choice("group", "batch", "none", default="group")
    """What the standard deviation that divides the advantages is taken over."""
    multi_objective_aggregation: str = choice("sum_then_normalize", "normalize_then_sum", default="sum_then_normalize")
    """Whether several rewards are added before or after they are normalized."""
    importance_sampling_level: str = choice("token", "sequence", default="token")
    """Whether importance weights are of tokens (GRPO) or of completions (GSPO)."""
    mask_truncated_completions: bool = False
    """Leave completions that were cut off out of the loss."""
    top_entropy_quantile: float = 1.0
    """Share of the tokens, those of highest entropy, that are trained on."""
    disable_dropout: bool = True
    """Train without dropout, so that what was sampled is what is scored."""
    prompts_per_image: int | None = None
    """Prompts drawn of each image in an epoch: its captions are one, each question another; all by default."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least_one(self, "max_completion_length", "prompts_per_image")
        check_above_zero(self, "temperature")
        if self.num_generations < 2:
            raise UsageError(f"num_generations is {self.num_generations}; it must be at least 2, to compare them")
        if self.beta < 0:
            raise UsageError(f"beta is {self.beta}; it must be 0 or more")
        if not 0 < self.top_entropy_quantile <= 1:
            raise UsageError(f"top_entropy_quantile is {self.top_entropy_quantile}; it must be above 0 and at most 1")


# `--help` shows the groups from the last base class to the first
@dataclass(kw_only=True)
class GrpoSettings(
    HardwareSettings,
    SpeedSettings,
    CheckpointSettings,
    GeneratedCaptionSettings,
    OptimizerSettings,
    PackedBatchSettings,
    TrainedPartsSettings,
    PolicySettings,
    RewardSettings,
):
    """`blipren grpo`: completions are sampled, rewarded and compared. Steps are optimizer updates everywhere."""

    model: str = positional()
    """Checkpoint folder or Hub id to start from, which answers already."""
    cache: str = positional()
    """Feature cache, or several with weights: CACHE=2,OTHER=1. Its captions and questions are the prompts."""
    out: str = positional()
    """Run folder; it loads as a checkpoint. The same command run again goes on where it stopped."""
    keep_best: str = choice("reward", "CIDEr", "last", default="reward")
    """Which model OUT holds at the end: that of highest validation reward of greedy answers, of highest CIDEr, or the
    last."""
    learning_rate: float = 1e-5
    """Peak learning rate."""

    def __post_init__(self):
        super().__post_init__()
        if self.merge_lora and not (self.full and self.llm_tuning == "lora"):
            raise UsageError("merge_lora needs llm_tuning lora and full: a bridge cannot hold the merged weights")


def run(settings: GrpoSettings) -> int | None:
    """Run the command. Returns the exit status."""
    check_checkpoint(settings.model)
    check_cache(settings.cache)
    if settings.facts is not None:
        from pathlib import Path

        if not (Path(settings.facts) / "metadata.jsonl").is_file():
            raise UserError(f"facts {settings.facts} has no metadata.jsonl; give the folder of the pictures")
    check_trl()

    from blipren.training.stages.grpo import grpo

    return grpo(settings)
