"""Stage 1: train the Q-Former with ITC, ITM and ITG."""

from dataclasses import dataclass, field
from pathlib import Path

from blipren.training.arguments import check_base_model, check_cache_folder, check_checkpoint
from blipren.training.errors import UsageError
from blipren.training.settings import Settings, choice, positional


@dataclass(kw_only=True)
class AlignSettings(Settings):
    """`blipren align`: stage-1 training of the Q-Former with ITC, ITM and ITG."""

    model: str = positional()
    """Checkpoint folder or Hub id to start from."""
    cache: str = positional()
    """Feature cache."""
    out: str = positional()
    """Run folder; it loads as a checkpoint."""
    tokenizer: str | None = None
    """WordPiece tokenizer of the Q-Former's text side, Hub id or folder; by default the checkpoint's own."""
    qformer_init: str | None = None
    """BERT or DistilBERT checkpoint that the Q-Former starts from; its tokenizer is taken unless another is given."""
    itc_weight: float = 1.0
    """Weight of image-text contrast."""
    itm_weight: float = 1.0
    """Weight of image-text matching."""
    itg_weight: float = 1.0
    """Weight of image-grounded text generation."""
    itc: str = choice("softmax", "sigmoid", default="softmax")
    """Form of the contrast: softmax over the batch (BLIP-2) or a sigmoid for every pair (SigLIP)."""
    pooling: str = choice("max", "mean", default="max")
    """How queries are put together for the contrast: the best one counts (BLIP-2), or their mean."""
    itc_label_smoothing: float = 0.1
    """Label smoothing of the softmax contrast."""
    itg_label_smoothing: float = 0.1
    """Label smoothing of generation."""
    temperature: float = 0.07
    """Temperature that the contrast starts with; it is learned."""
    embedding_width: int = 256
    """Width of the image and text embeddings."""
    batch_size: int = 128
    """Image-caption pairs of a step over all processes: the contrast's batch."""
    micro_batch_size: int | None = None
    """Pairs of a process whose graph is held at once; below its share of the batch, gradients are cached."""
    epochs: float = 10.0
    """Passes over all image-caption pairs of the training split; max_steps overrides it."""
    max_steps: int | None = None
    """Number of steps (optimizer updates)."""
    max_minutes: float | None = None
    """Stop after this time, validations included; the learning rate then follows the time instead of the steps."""
    learning_rate: float = 1e-4
    """Peak learning rate of the Q-Former's body: self-attention, feed-forward, text embeddings."""
    new_learning_rate: float | None = None
    """Peak learning rate of queries, cross-attention, projections and heads, which begin at random; as above by default."""
    weight_decay: float = 0.05
    """Weight decay of AdamW; norms, biases, embeddings, queries and temperature have none."""
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """Betas of AdamW."""
    warmup: float = 0.05
    """Steps of linear warm-up; below 1, their share of the run."""
    schedule: str = choice("cosine", "linear", "constant", default="cosine")
    """Course of the learning rate behind the warm-up."""
    min_learning_rate: float = 0.1
    """Where cosine ends, as a share of the peak."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 leaves it as it is."""
    feature_dropout: float = 0.0
    """Share of the patches that are zeroed in training."""
    ema: float = 0.0
    """Decay of an average of the trained weights that is validated and kept instead of them; 0 keeps the weights."""
    max_text_tokens: int = 32
    """Caption tokens, special ones included; what is longer is cut."""
    eval_every: int | None = None
    """Steps between measurements of validation recall; once an epoch by default."""
    eval_images: int | None = None
    """Validation images that recall is measured on, the first ones; all by default."""
    save_every: int | None = None
    """Steps between checkpoints; eval_every by default."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept, besides the best model."""
    log_every: int = 10
    """Steps between log lines."""
    report_to: list[str] = field(default_factory=list)
    """Trackers: trackio, tensorboard, wandb, mlflow."""
    precision: str = choice("auto", "fp32", "bf16", default="auto")
    """Arithmetic: auto is bf16 where the GPU has it, else fp32. Weights and the contrast stay in fp32."""
    device: str = choice("auto", "cpu", "cuda", "mps", default="auto")
    """Where to train."""
    workers: int = 0
    """Processes that load batches."""
    full: bool = False
    """Write a full checkpoint that holds the frozen encoder too, instead of a bridge checkpoint."""
    seed: int = 0
    """Seed of new weights, order, dropout and negatives."""

    def __post_init__(self):
        super().__post_init__()
        if min(self.itc_weight, self.itm_weight, self.itg_weight) < 0 or not (
            self.itc_weight + self.itm_weight + self.itg_weight
        ):
            raise UsageError("loss weights must not be negative, and one of them above 0")
        for name in ("batch_size", "log_every", "max_text_tokens", "keep_checkpoints", "embedding_width"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("micro_batch_size", "max_steps", "max_minutes", "eval_every", "save_every", "eval_images"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be above 0, or absent")
        for name in ("temperature", "epochs", "learning_rate"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("itc_label_smoothing", "itg_label_smoothing", "feature_dropout", "ema", "min_learning_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if len(self.adam_betas) != 2:
            raise UsageError(f"adam_betas has {len(self.adam_betas)} numbers; it must have 2")


def run(settings: AlignSettings) -> int | None:
    """Run the command. Returns the exit status."""
    check_checkpoint(settings.model)
    check_cache_folder(Path(settings.cache))
    for name in filter(None, (settings.tokenizer, settings.qformer_init)):
        check_base_model(name)

    from blipren.training.stages.align import align

    return align(settings)
