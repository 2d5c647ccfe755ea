"""Stage 2: train the bridge through the language model."""

from dataclasses import dataclass, field

from blipren.training.arguments import check_cache, check_checkpoint, check_dataset, check_files
from blipren.training.data.sources.settings import GroundingSettings
from blipren.training.engine.settings import (
    CheckpointSettings,
    GeneratedCaptionSettings,
    HardwareSettings,
    MuonSettings,
    OptimizerSettings,
    TrainedPartsSettings,
    check_above_zero,
    check_at_least_one,
    check_share,
)
from blipren.training.errors import UsageError
from blipren.training.objectives.experiments.settings import ExperimentSettings, parse_experiments
from blipren.training.settings import Settings, choice, positional


@dataclass(kw_only=True)
class ImageInputSettings(Settings):
    """Images in place of cached features."""

    online: bool = False
    """Read images instead of cached features: CACHE is then a dataset, decoded and encoded as it is needed. The settings
    of columns and splits are for it alone."""
    augment: bool = False
    """Train on random crops, mirrored unless the texts name sides, with --online."""
    train_vision: bool = False
    """Train the vision encoder too, with --online."""


@dataclass(kw_only=True)
class ScalingSettings(Settings):
    """Speed, memory and several processes."""

    attention: str | None = choice(None, "eager", "sdpa", "flex_attention", default=None)
    """Attention of the language model in training; its own by default. flex_attention (on GPUs) skips the blocks of a
    long row that are masked."""
    fused_loss: bool = False
    """Never hold all logits of a step: less memory with large vocabularies, a little slower (needs torch 2.13)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    compile: bool = False
    """Compile the transformer layers (torch.compile)."""
    compile_backend: str = "inductor"
    """Backend of torch.compile."""
    fsdp: bool = False
    """Under torchrun, shard model and optimizer over the processes (FSDP2) instead of copying them to each (DDP)."""
    deepspeed: str | None = None
    """Under torchrun, a DeepSpeed configuration (JSON) of ZeRO stage 1 or 2; training/recipes/deepspeed has two."""


@dataclass(kw_only=True)
class ObjectiveSettings(Settings):
    """Objective and regularization."""

    likelihood_weight: float = 1.0
    """Weight of the likelihood of answers; 0 leaves the language model out of the step."""
    label_smoothing: float = 0.0
    """Share of each target's probability that is spread over the vocabulary; the logged loss is without it."""
    word_dropout: float = 0.0
    """Share of an answer's input tokens that later ones cannot attend to, in training."""
    feature_dropout: float = 0.0
    """Share of the patches that are hidden from the bridge in training."""
    feature_noise: float = 0.0
    """Standard deviation of noise on patch features, in units of their own, in training."""
    experiments: dict = field(default_factory=dict)
    """Experiments by name with their settings (training/objectives/experiments/settings.py): {bag_of_words: {weight: 0.05},
    consensus: {captions: 3}}."""

    def __post_init__(self):
        super().__post_init__()
        check_share(self, "label_smoothing", "word_dropout", "feature_dropout")
        experiments = self.experiment_settings()
        if self.likelihood_weight < 0:
            raise UsageError(f"likelihood_weight is {self.likelihood_weight}; it must be 0 or more")
        if not self.likelihood_weight and experiments.bag_of_words is None:
            raise UsageError("likelihood_weight is 0 and nothing else is trained: add bag_of_words")

    def experiment_settings(self) -> ExperimentSettings:
        """Return the settings of each experiment. Raises `UsageError` for a wrong one."""
        return parse_experiments(self.experiments)


@dataclass(kw_only=True)
class BatchSettings(Settings):
    """Batches."""

    epochs: float = 5.0
    """Passes over the data; max_steps overrides it."""
    batch_size: int = 32
    """Images of a step, over all processes and micro-batches together."""
    micro_batches: int = 1
    """Parts that a step is cut into to save memory, over all processes together; a multiple of their number."""
    answers_per_image: int | None = None
    """Answers drawn of each image in an epoch; all of them by default."""
    max_answer_tokens: int | None = None
    """Longer answers are cut; a cut one does not teach an end."""
    traces: str = choice("learn", "mask", "drop", default="learn")
    """Traces of reasoning in front of the answers of conversations (<think> ... </think>): learn them, mask them (they
    are read and not learned), or drop them. Earlier answers are read without their trace."""
    shared_prefix: bool = True
    """All answers of an image in one row behind one prefix; --no-shared-prefix gives each a padded row of its own."""
    row_tokens: int | None = None
    """Tokens of a packed row; by default the length that costs least."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least_one(self, "batch_size", "micro_batches", "answers_per_image", "max_answer_tokens", "row_tokens")
        check_above_zero(self, "epochs")


# `--help` shows the groups from the last base class to the first
@dataclass(kw_only=True)
class TrainSettings(
    HardwareSettings,
    ScalingSettings,
    GroundingSettings,
    ImageInputSettings,
    CheckpointSettings,
    GeneratedCaptionSettings,
    ObjectiveSettings,
    MuonSettings,
    OptimizerSettings,
    BatchSettings,
    TrainedPartsSettings,
):
    """`blipren train`: captions and answers through the language model. Steps are optimizer updates everywhere."""

    model: str = positional()
    """Checkpoint folder or Hub id to start from."""
    cache: str = positional()
    """Feature cache, or several with weights: CACHE=2,OTHER=1. With --online a dataset instead."""
    out: str = positional()
    """Run folder; it loads as a checkpoint. The same command run again goes on where it stopped."""

    def __post_init__(self):
        super().__post_init__()
        if self.online and "consensus" in self.experiments:
            raise UsageError("the experiment consensus needs a feature cache: leave online out")
        if self.merge_lora and not (self.full and self.llm_tuning == "lora"):
            raise UsageError("merge_lora needs llm_tuning lora and full: a bridge cannot hold the merged weights")
        if self.llm_bits == 8 and self.fsdp:
            raise UsageError("llm_bits 8 cannot be sharded by fsdp; take llm_bits 4, or leave fsdp out")
        if self.fused_loss and self.label_smoothing:
            raise UsageError("fused_loss never holds the logits that label_smoothing needs: leave one of them out")
        if self.deepspeed and (self.fsdp or self.compile):
            raise UsageError("deepspeed goes with neither fsdp nor compile: leave one of them out")
        if self.optimizer == "muon" and (self.fsdp or self.deepspeed):
            raise UsageError("optimizer muon needs whole matrices: leave fsdp and deepspeed out")
        if self.optimizer == "muon" and not self.train_connector:
            raise UsageError(
                "optimizer muon updates the connector's matrices, and train_connector is off: leave one out"
            )
        if self.train_vision and not self.online:
            raise UsageError("train_vision needs online: cached features are those of the frozen encoder")
        if self.grounding and not self.online:
            raise UsageError(
                "grounding needs online; the questions of a cache are made by `blipren embed --grounding`"
            )
        if self.augment and not self.online:
            raise UsageError("augment needs online; cached views are made by `blipren embed --views`")


def run(settings: TrainSettings) -> int | None:
    """Run the command. Returns the exit status."""
    check_checkpoint(settings.model)
    if settings.online:
        check_dataset(settings.cache)
    else:
        check_cache(settings.cache)
    if settings.deepspeed is not None:
        check_files(settings.deepspeed)

    from blipren.training.stages.train import train

    return train(settings)
