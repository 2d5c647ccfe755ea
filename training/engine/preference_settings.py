"""Groups of settings that `dpo` and `grpo` share. Nothing here imports torch."""

import importlib.util
from dataclasses import dataclass

from blipren.training.engine.settings import check_above_zero, check_at_least_one
from blipren.training.errors import UserError
from blipren.training.settings import Settings, choice


def check_trl() -> None:
    """Raise `UserError` unless TRL is installed."""
    if importlib.util.find_spec("trl") is None:
        raise UserError("dpo and grpo need TRL, whose losses they are: pip install blipren[trl]")


@dataclass(kw_only=True)
class SpeedSettings(Settings):
    """Speed and memory."""

    attention: str | None = choice(None, "eager", "sdpa", "flex_attention", default=None)
    """Attention of the language model in training; its own by default. flex_attention (on GPUs) skips the blocks of a
    long row that are masked."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""


@dataclass(kw_only=True)
class PackedBatchSettings(Settings):
    """Batches."""

    epochs: float = 1.0
    """Passes over the data; max_steps overrides it."""
    batch_size: int = 32
    """Images of a step, over all processes and micro-batches together."""
    micro_batches: int = 1
    """Parts that a step is cut into to save memory, over all processes together; a multiple of their number."""
    shared_prefix: bool = True
    """All answers of an image in one row behind one prefix; --no-shared-prefix gives each a padded row of its own."""
    row_tokens: int | None = None
    """Tokens of a packed row; by default the length that costs least."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least_one(self, "batch_size", "micro_batches", "row_tokens")
        check_above_zero(self, "epochs")
