"""Learn preferences: chosen answers against rejected ones, DPO through TRL, on cached features."""

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
)
from blipren.training.errors import UsageError
from blipren.training.settings import Settings, choice, positional

LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
# losses of the difference between chosen and rejected, in which the partition function of an f-divergence cancels
DIVERGENCE_LOSSES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}


@dataclass(kw_only=True)
class PreferenceSettings(Settings):
    """The loss, by TRL's names (DPOConfig)."""

    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])
    """TRL's loss, or several that are added: sigmoid (DPO), hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard,
    aot, aot_unpaired, apo_zero, apo_down, discopop, sft, sigmoid_norm."""
    loss_weights: list[float] = field(default_factory=list)
    """Weight of each loss; 1 by default."""
    beta: float = 0.1
    """How much the model is kept near the model before training: higher is nearer."""
    label_smoothing: float = 0.0
    """Of robust: the share of pairs that are the wrong way round, of exo_pair: its epsilon; and of aot."""
    ld_alpha: float | None = None
    """Weight of the tokens by which the longer answer is longer (LD-DPO); they count fully by default."""
    f_divergence_type: str = choice(
        "reverse_kl", "forward_kl", "js_divergence", "alpha_divergence", default="reverse_kl"
    )
    """Divergence from the model before training."""
    f_alpha_divergence_coef: float = 0.5
    """Alpha of alpha_divergence."""
    use_weighting: bool = False
    """Weigh pairs by how likely the model is to say them (WPO)."""
    discopop_tau: float = 0.05
    """Temperature of discopop."""
    disable_dropout: bool = True
    """Train without dropout, as the reference is computed."""

    def __post_init__(self):
        super().__post_init__()
        check_above_zero(self, "beta", "discopop_tau")
        if unknown := [name for name in self.loss_type if name not in LOSSES]:
            raise UsageError(f"loss_type has {unknown[0]!r}; losses are {', '.join(LOSSES)}")
        if self.loss_weights and len(self.loss_weights) != len(self.loss_type):
            raise UsageError(f"loss_weights has {len(self.loss_weights)} numbers for {len(self.loss_type)} losses")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise UsageError(f"ld_alpha is {self.ld_alpha}; it must be 0 to 1")
        if "exo_pair" in self.loss_type and not self.label_smoothing:
            raise UsageError("loss_type exo_pair needs label_smoothing above 0, such as 0.001")
        if "robust" in self.loss_type and not 0 <= self.label_smoothing < 0.5:
            raise UsageError(f"label_smoothing is {self.label_smoothing}; loss_type robust wants it below 0.5")
        if self.f_divergence_type != "reverse_kl" and (other := set(self.loss_type) - DIVERGENCE_LOSSES):
            raise UsageError(
                f"f_divergence_type {self.f_divergence_type} goes with the losses {', '.join(sorted(DIVERGENCE_LOSSES))}; "
                f"{min(other)} is none of them"
            )
        if self.use_weighting and {"aot", "aot_unpaired"} & set(self.loss_type):
            raise UsageError("use_weighting does not go with aot and aot_unpaired, which sort the pairs")


# `--help` shows the groups from the last base class to the first
@dataclass(kw_only=True)
class DpoSettings(
    HardwareSettings,
    SpeedSettings,
    CheckpointSettings,
    GeneratedCaptionSettings,
    OptimizerSettings,
    PackedBatchSettings,
    TrainedPartsSettings,
    PreferenceSettings,
):
    """`blipren dpo`: chosen answers become likelier than rejected ones. Steps are optimizer updates everywhere."""

    model: str = positional()
    """Checkpoint folder or Hub id to start from; it is the reference, too."""
    cache: str = positional()
    """Feature cache of a data set with the columns prompt, chosen and rejected, or several with weights:
    CACHE=2,OTHER=1."""
    out: str = positional()
    """Run folder; it loads as a checkpoint. The same command run again goes on where it stopped."""
    learning_rate: float = 1e-5
    """Peak learning rate."""

    def __post_init__(self):
        super().__post_init__()
        if self.merge_lora and not (self.full and self.llm_tuning == "lora"):
            raise UsageError("merge_lora needs llm_tuning lora and full: a bridge cannot hold the merged weights")


def run(settings: DpoSettings) -> int | None:
    """Run the command. Returns the exit status."""
    check_checkpoint(settings.model)
    check_cache(settings.cache)
    check_trl()

    from blipren.training.stages.dpo import dpo

    return dpo(settings)
