"""Groups of settings that the training stages share. Nothing here imports torch.

`--help` shows a group for each class, under the first line of its docstring. Steps are optimizer updates everywhere.
"""

import importlib.util
import re
from dataclasses import dataclass, field

from blipren.training.errors import UsageError, UserError
from blipren.training.settings import Settings, choice

TRACKERS = ("trackio", "tensorboard", "wandb", "mlflow")


def check_at_least_one(settings: Settings, *names: str) -> None:
    """Raise `UsageError` for a setting below 1. None means that the setting is absent."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; it must be at least 1")


def check_above_zero(settings: Settings, *names: str) -> None:
    """Raise `UsageError` for a setting that is not above 0. None means that the setting is absent."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise UsageError(f"{name} is {value}; it must be above 0")


def check_share(settings: Settings, *names: str) -> None:
    """Raise `UsageError` for a setting that is not a share: at least 0 and below 1."""
    for name in names:
        if not 0 <= getattr(settings, name) < 1:
            raise UsageError(f"{name} is {getattr(settings, name)}; it must be at least 0 and below 1")


@dataclass(kw_only=True)
class HardwareSettings(Settings):
    """Hardware, precision and seed."""

    device: str = choice("auto", "cpu", "cuda", "mps", default="auto")
    """Where to train."""
    precision: str = choice("auto", "fp32", "bf16", "fp16", default="auto")
    """Arithmetic: auto is bf16 where the GPU has it, else fp32. Weights that are trained stay in fp32."""
    workers: int = 0
    """Processes that load batches."""
    seed: int = 0
    """Seed of everything that is drawn: new weights, order, prompts, dropout, negatives."""


@dataclass(kw_only=True)
class CheckpointSettings(Settings):
    """Validation, checkpoints and log."""

    eval_every: int | None = None
    """Steps between validations; once an epoch by default."""
    save_every: int | None = None
    """Steps between checkpoints; eval_every by default."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep, besides the best model."""
    log_every: int = 10
    """Steps between log lines."""
    report_to: list[str] = field(default_factory=list)
    """Trackers that get the log too, each a package to install: trackio, tensorboard, wandb, mlflow."""
    full: bool = False
    """Write a full checkpoint that holds the frozen parts too, instead of a bridge checkpoint."""
    push_to: str | None = None
    """Publish the finished model with its card as this Hub repository: user/name. If that fails, the same command tries
    again."""
    public: bool = False
    """Let everybody see the repository of push_to, which is private otherwise."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least_one(self, "eval_every", "save_every", "keep_checkpoints", "log_every")
        for tracker in self.report_to:
            if tracker not in TRACKERS:
                raise UsageError(f"report_to has {tracker!r}; trackers are: {', '.join(TRACKERS)}")
            if importlib.util.find_spec(tracker) is None:
                raise UserError(
                    f"report_to {tracker} needs the package {tracker}, which is not installed: pip install {tracker}"
                )
        if self.push_to is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to):
            raise UsageError(f"push_to is {self.push_to!r}; it must be user/name")
        if self.public and self.push_to is None:
            raise UsageError("public needs push_to: name the Hub repository")


@dataclass(kw_only=True)
class GeneratedCaptionSettings(Settings):
    """Best model, and captions generated during training."""

    keep_best: str = choice("loss", "CIDEr", "last", default="loss")
    """Which model OUT holds at the end: that of least validation loss, of highest validation CIDEr, or the last."""
    patience: int | None = None
    """Stop after this number of validations without a better model."""
    generate_samples: int = 4
    """Validation images whose captions are logged before, during and after training."""
    max_new_tokens: int = 40
    """Most tokens of a generated caption."""
    num_beams: int = 1
    """Beams of the generated captions."""
    length_penalty: float = 1.0
    """With beams: divide a beam's score by its length to this power; 0 prefers shorter captions."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least_one(self, "patience")


@dataclass(kw_only=True)
class OptimizerSettings(Settings):
    """Optimizer (AdamW)."""

    max_steps: int | None = None
    """Number of steps, whatever epochs says."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Weight decay; norms, biases, embeddings, queries and temperatures have none."""
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """Betas."""
    warmup: float = 0.05
    """Steps of linear warm-up; below 1, their share of all steps."""
    schedule: str = choice("cosine", "linear", "constant", default="cosine")
    """Learning rate after the warm-up."""
    min_learning_rate: float = 0.1
    """Where cosine ends, as a share of the peak."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    ema: float = 0.0
    """Decay of an average of the trained weights, which is validated and kept in their place; 0 keeps the weights."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least_one(self, "max_steps")
        check_above_zero(self, "learning_rate")
        check_share(self, "min_learning_rate", "ema")
        if len(self.adam_betas) != 2:
            raise UsageError(f"adam_betas has {len(self.adam_betas)} numbers; it must have 2")


@dataclass(kw_only=True)
class MuonSettings(Settings):
    """Optimizer of the matrices of Q-Former and projector."""

    optimizer: str = choice("adamw", "muon", default="adamw")
    """What updates these matrices. Muon needs fewer steps from a new connector. AdamW updates everything else."""
    muon_momentum: float = 0.95
    """Momentum of Muon."""
    muon_learning_rate: float | None = None
    """Peak learning rate of Muon, in units of AdamW's; that of the part by default."""

    def __post_init__(self):
        super().__post_init__()
        check_share(self, "muon_momentum")
        if self.muon_learning_rate is not None:
            check_above_zero(self, "muon_learning_rate")


@dataclass(kw_only=True)
class TrainedPartsSettings(Settings):
    """What is trained."""

    llm_tuning: str = choice("frozen", "lora", "full", default="frozen")
    """What of the language model is trained."""
    train_connector: bool = True
    """Train Q-Former and projector."""
    train_qformer: bool = True
    """Train the Q-Former; --no-train-qformer trains the projector alone."""
    learning_rates: dict = field(default_factory=dict)
    """Peak learning rates by part where they differ: {qformer: 1.0e-4, projector: 5.0e-4, llm: 2.0e-5}."""
    lora_rank: int = 16
    """Rank of LoRA."""
    lora_alpha: float = 32.0
    """Scale of LoRA: its update is multiplied by alpha / rank."""
    lora_dropout: float = 0.05
    """Dropout of LoRA's input."""
    lora_targets: list[str] = field(default_factory=list)
    """Names of the language model's linear layers that get LoRA, such as q_proj v_proj; all of them when empty."""
    merge_lora: bool = False
    """Add LoRA to the language model's weights at the end; needs --full."""
    llm_bits: int | None = choice(None, 4, 8, default=None)
    """Load the language model in 4 or 8 bit (pip install bitsandbytes), frozen or under LoRA."""
    router_balance_weight: float | None = None
    """Weight of the load-balancing loss of the MoE projector; the checkpoint's own by default."""
    router_z_weight: float | None = None
    """Weight of its router z-loss; the checkpoint's own by default."""
    router_noise: float | None = None
    """Standard deviation of noise on its router's logits, in training; the checkpoint's own by default."""

    def __post_init__(self):
        super().__post_init__()
        check_share(self, "lora_dropout")
        unknown = set(self.learning_rates) - {"qformer", "projector", "llm", "vision"}
        if unknown:
            raise UsageError(
                f"learning_rates has a part {min(unknown)!r}; parts are qformer, projector, llm and vision"
            )
        for part, rate in self.learning_rates.items():
            if not isinstance(rate, float | int) or isinstance(rate, bool):
                raise UsageError(f"learning_rates has {rate!r} for {part}; YAML wants 1.0e-4, with a point")
        if self.llm_bits is not None and self.llm_tuning == "full":
            raise UsageError(f"llm_bits {self.llm_bits} cannot be trained fully; use llm_tuning frozen or lora")
