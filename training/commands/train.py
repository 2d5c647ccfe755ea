"""Stage 2: train the bridge through the language model."""

from dataclasses import dataclass, field

from blipren.training.arguments import check_cache, check_checkpoint, check_dataset, check_files
from blipren.training.data.sources.settings import SourceSettings
from blipren.training.errors import UsageError
from blipren.training.settings import choice, positional


@dataclass(kw_only=True)
class TrainSettings(SourceSettings):
    """`blipren train`: captioning through the LLM. Steps are optimizer updates everywhere."""

    model: str = positional()
    """Checkpoint folder or Hub id to start from."""
    cache: str = positional()
    """Feature cache, or several with weights: CACHE=2,OTHER=1. With --online a dataset instead."""
    out: str = positional()
    """Run folder; it loads as a checkpoint. The same command run again goes on where it stopped."""

    llm_tuning: str = choice("frozen", "lora", "full", default="frozen")
    """What of the language model is trained."""
    train_connector: bool = True
    """Train Q-Former and projector."""
    train_qformer: bool = True
    """Train the Q-Former; --no-train-qformer trains the projector alone."""
    lora_rank: int = 16
    """Rank of LoRA."""
    lora_alpha: float = 32.0
    """Scale of LoRA: its update is multiplied by alpha / rank."""
    lora_dropout: float = 0.05
    """Dropout of LoRA's input."""
    lora_targets: list[str] = field(default_factory=list)
    """Names of the language model's linear layers that get LoRA, such as q_proj v_proj; all of them when empty."""
    llm_bits: int | None = choice(None, 4, 8, default=None)
    """Load the language model in 4 or 8 bit (pip install bitsandbytes), frozen or under LoRA."""
    merge_lora: bool = False
    """Add LoRA into the language model's weights at the end; needs --full."""
    full: bool = False
    """Write a full checkpoint that holds the frozen parts too, instead of a bridge checkpoint."""

    epochs: float = 5.0
    """Passes over the data; max_steps overrides it."""
    max_steps: int | None = None
    """Number of steps."""
    batch_size: int = 32
    """Images of a step, over all processes and micro-batches together."""
    micro_batches: int = 1
    """Parts that a step is cut into to save memory, over all processes together; a multiple of their number."""
    answers_per_image: int | None = None
    """Answers drawn of each image in an epoch; all of them by default."""
    max_answer_tokens: int | None = None
    """Longer answers are cut; a cut one does not teach an end."""
    shared_prefix: bool = True
    """All answers of an image in one row behind one prefix; --no-shared-prefix gives each a padded row of its own."""
    row_tokens: int | None = None
    """Tokens of a packed row; by default the length that costs least."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    learning_rates: dict = field(default_factory=dict)
    """Peak learning rates by part where they differ: {qformer: 1.0e-4, projector: 5.0e-4, llm: 2.0e-5}."""
    weight_decay: float = 0.05
    """Weight decay of AdamW; norms, biases, embeddings and queries have none."""
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """Betas of AdamW."""
    warmup: float = 0.05
    """Steps of linear warm-up; below 1, their share of all steps."""
    schedule: str = choice("cosine", "linear", "constant", default="cosine")
    """Course of the learning rate behind the warm-up."""
    min_learning_rate: float = 0.1
    """Where cosine ends, as a share of the peak."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 leaves it as it is."""
    label_smoothing: float = 0.0
    """Share of each target's probability that is spread over the vocabulary; the logged loss is without it."""
    fused_loss: bool = False
    """Never hold all logits of a step: less memory with large vocabularies, a little slower (needs torch 2.13)."""
    word_dropout: float = 0.0
    """Share of the answer's input tokens that the language model cannot look back at, in training."""
    feature_dropout: float = 0.0
    """Share of the patches that are hidden from the bridge in training."""
    feature_noise: float = 0.0
    """Standard deviation of noise on patch features, in units of their own, in training."""
    likelihood_weight: float = 1.0
    """Weight of the captions' likelihood through the language model; 0 leaves the language model out of the step."""
    words_weight: float = 0.0
    """Weight of bag-of-words prediction: which tokens an image's captions hold, from its mean image feature through a
    linear head that is thrown away. A cheap first stage with likelihood_weight 0, and a regulariser behind it."""
    consensus_captions: int = 0
    """Captions of other images that an image learns in place of its own: those that the features foretell to score the
    highest CIDEr against its own (training/consensus.py). For small data sets; 0 keeps each image's own."""
    reward_weight: float = 0.0
    """Weight of self-critical training (arXiv 1612.00563): sampled captions that score a higher CIDEr-D than their
    fellows become likelier. For a bridge that captions already; 0 leaves it out."""
    reward_samples: int = 5
    """Captions sampled of each image for it."""
    reward_temperature: float = 0.6
    """Temperature of the sampling."""
    reward_max_tokens: int = 24
    """Longest sample; one that has not ended by then gets no reward."""
    ema: float = 0.0
    """Decay of an average of the trained weights that is validated and kept instead of them; 0 keeps the weights."""
    router_balance_weight: float | None = None
    """Weight of the load-balancing loss of the MoE projector; the checkpoint's own by default."""
    router_z_weight: float | None = None
    """Weight of its router z-loss."""
    router_noise: float | None = None
    """Standard deviation of noise on its router's logits, in training."""

    eval_every: int | None = None
    """Steps between validations; once an epoch by default. All of validation is used."""
    save_every: int | None = None
    """Steps between checkpoints; eval_every by default."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept, besides the best model."""
    keep_best: str = choice("loss", "CIDEr", "last", default="loss")
    """Which model OUT holds in the end: that of least validation loss, of highest validation CIDEr, or the last."""
    patience: int | None = None
    """Validations without a better model after which training stops."""
    generate_samples: int = 4
    """Validation images whose captions are logged before, during and after training."""
    max_new_tokens: int = 40
    """Longest generated caption."""
    num_beams: int = 1
    """Beams of the captions generated in training."""
    length_penalty: float = 1.0
    """With beams: their score is divided by length to this power; 0 prefers shorter captions."""
    log_every: int = 10
    """Steps between log lines."""
    report_to: list[str] = field(default_factory=list)
    """Trackers: trackio, tensorboard, wandb, mlflow."""

    online: bool = False
    """Read images instead of cached features: CACHE is then a dataset, decoded and encoded as it is needed. The
    settings of columns and splits are for it alone."""
    augment: bool = False
    """Train on random crops, mirrored unless the texts name sides, with --online."""
    train_vision: bool = False
    """Train the vision encoder too, with --online."""
    precision: str = choice("auto", "fp32", "bf16", "fp16", default="auto")
    """Arithmetic: auto is bf16 where the GPU has it, else fp32. The trained connector's weights stay in fp32."""
    attention: str | None = choice(None, "eager", "sdpa", "flex_attention", default=None)
    """Attention of the language model in training; its own by default. flex_attention (on GPUs) passes over what a row's
    answers do not see of each other: for long rows."""
    compile: bool = False
    """Compile the model (torch.compile)."""
    compile_backend: str = "inductor"
    """Backend of torch.compile."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    fsdp: bool = False
    """Under torchrun, shard model and optimizer over the processes (FSDP2) instead of copying them to each (DDP)."""
    deepspeed: str | None = None
    """Under torchrun, a DeepSpeed configuration (JSON) of ZeRO stage 1 or 2; training/recipes/deepspeed has two."""
    device: str = choice("auto", "cpu", "cuda", "mps", default="auto")
    """Where to train."""
    workers: int = 0
    """Processes that load batches."""
    seed: int = 0
    """Seed of order, prompts, dropout and everything else that is drawn."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("batch_size", "micro_batches", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_steps", "eval_every", "save_every", "patience", "answers_per_image", "max_answer_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1, or absent")
        for name in ("label_smoothing", "word_dropout", "feature_dropout", "ema", "min_learning_rate", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        weights = (self.likelihood_weight, self.words_weight, self.reward_weight)
        if min(weights) < 0 or not sum(weights):
            raise UsageError("likelihood_weight, words_weight and reward_weight must not be negative, and one above 0")
        if self.reward_weight and (self.reward_samples < 2 or self.reward_temperature <= 0 or self.online):
            raise UsageError(
                "reward_weight needs a feature cache, reward_samples of 2 or more, reward_temperature above 0"
            )
        if self.consensus_captions < 0 or (self.consensus_captions and self.online):
            raise UsageError(
                f"consensus_captions is {self.consensus_captions}; it must be 0 or more, and needs a feature cache"
            )
        if self.epochs <= 0:
            raise UsageError(f"epochs is {self.epochs}; it must be above 0")
        unknown = set(self.learning_rates) - {"qformer", "projector", "llm", "vision"}
        if unknown:
            raise UsageError(
                f"learning_rates has a part {min(unknown)!r}; parts are qformer, projector, llm and vision"
            )
        for part, rate in self.learning_rates.items():
            if not isinstance(rate, float | int) or isinstance(rate, bool):
                raise UsageError(f"learning_rates has {rate!r} for {part}; YAML wants 1.0e-4, with a point")
        if len(self.adam_betas) != 2:
            raise UsageError(f"adam_betas has {len(self.adam_betas)} numbers; it must have 2")
        if self.merge_lora and not (self.full and self.llm_tuning == "lora"):
            raise UsageError("merge_lora needs llm_tuning lora and full: a bridge cannot hold the merged weights")
        if self.llm_bits is not None and self.llm_tuning == "full":
            raise UsageError(f"llm_bits {self.llm_bits} cannot be trained fully; use llm_tuning frozen or lora")
        if self.llm_bits == 8 and self.fsdp:
            raise UsageError("llm_bits 8 cannot be sharded by fsdp; take llm_bits 4, or leave fsdp out")
        if self.fused_loss and self.label_smoothing:
            raise UsageError("fused_loss never holds the logits that label_smoothing needs: leave one of them out")
        if self.deepspeed and (self.fsdp or self.compile):
            raise UsageError("deepspeed goes with neither fsdp nor compile: leave one of them out")
        if self.train_vision and not self.online:
            raise UsageError("train_vision needs online: cached features are those of the frozen encoder")
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
