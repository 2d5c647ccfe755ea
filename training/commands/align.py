"""Stage 1: train the Q-Former with ITC, ITM and ITG."""

from dataclasses import dataclass
from pathlib import Path

from blipren.training.arguments import check_base_model, check_cache_folder, check_checkpoint
from blipren.training.engine.settings import (
    CheckpointSettings,
    HardwareSettings,
    OptimizerSettings,
    check_above_zero,
    check_at_least_one,
    check_share,
)
from blipren.training.errors import UsageError
from blipren.training.settings import Settings, choice, positional


@dataclass(kw_only=True)
class LossSettings(Settings):
    """Losses."""

    itc_weight: float = 1.0
    """Weight of image-text contrast."""
    itm_weight: float = 1.0
    """Weight of image-text matching."""
    itg_weight: float = 1.0
    """Weight of image-grounded text generation."""
    itc: str = choice("softmax", "sigmoid", default="softmax")
    """Form of the contrast: softmax over the batch (BLIP-2) or a sigmoid for every pair (SigLIP)."""
    pooling: str = choice("max", "mean", default="max")
    """How queries are pooled for the contrast: the best one counts (BLIP-2), or their mean."""
    itc_label_smoothing: float = 0.1
    """Label smoothing of the softmax contrast."""
    itg_label_smoothing: float = 0.1
    """Label smoothing of generation."""
    temperature: float = 0.07
    """Temperature that the contrast starts with; it is learned."""
    embedding_width: int = 256
    """Width of the image and text embeddings."""
    feature_dropout: float = 0.0
    """Share of the patches that are zeroed in training."""

    def __post_init__(self):
        super().__post_init__()
        weights = (self.itc_weight, self.itm_weight, self.itg_weight)
        if min(weights) < 0 or not sum(weights):
            raise UsageError(f"the loss weights are {weights}; none must be negative, and one must be above 0")
        check_at_least_one(self, "embedding_width")
        check_above_zero(self, "temperature")
        check_share(self, "itc_label_smoothing", "itg_label_smoothing", "feature_dropout")


@dataclass(kw_only=True)
class PairSettings(Settings):
    """Batches of image-caption pairs."""

    epochs: float = 10.0
    """Passes over all image-caption pairs of the training split; max_steps overrides it."""
    max_minutes: float | None = None
    """Stop after this time, validations included; the learning rate then follows the time instead of the steps."""
    batch_size: int = 128
    """Image-caption pairs of a step over all processes: the contrast's batch."""
    micro_batch_size: int | None = None
    """Pairs of a process whose graph is held at once; below its share of the batch, gradients are cached."""
    max_text_tokens: int = 32
    """Caption tokens, special ones included; what is longer is cut."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least_one(self, "batch_size", "micro_batch_size", "max_text_tokens")
        check_above_zero(self, "epochs", "max_minutes")


# `--help` shows the groups from the last base class to the first
@dataclass(kw_only=True)
class AlignSettings(HardwareSettings, CheckpointSettings, OptimizerSettings, PairSettings, LossSettings):
    """`blipren align`: stage-1 training of the Q-Former with ITC, ITM and ITG."""

    model: str = positional()
    """Checkpoint folder or Hub id to start from."""
    cache: str = positional()
    """Feature cache."""
    out: str = positional()
    """Run folder; it loads as a checkpoint. The same command run again goes on where it stopped."""
    tokenizer: str | None = None
    """WordPiece tokenizer of the Q-Former's text side, Hub id or folder; by default the checkpoint's own."""
    qformer_init: str | None = None
    """BERT or DistilBERT checkpoint that the Q-Former starts from; its tokenizer is taken unless another is given."""
    new_learning_rate: float | None = None
    """Peak learning rate of queries, cross-attention, projections and heads, which begin at random; learning_rate by
    default."""
    eval_images: int | None = None
    """Validation images that recall is measured on, the first ones; all by default."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least_one(self, "eval_images")
        check_above_zero(self, "new_learning_rate")
        if self.precision == "fp16":
            raise UsageError("align trains in bf16 or fp32: gradient caching does not scale gradients as fp16 needs")


def run(settings: AlignSettings) -> int | None:
    """Run the command. Returns the exit status."""
    check_checkpoint(settings.model)
    check_cache_folder(Path(settings.cache))
    for name in filter(None, (settings.tokenizer, settings.qformer_init)):
        check_base_model(name)

    from blipren.training.stages.align import align

    return align(settings)
