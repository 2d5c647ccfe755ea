"""Every setting of every command, as documented dataclasses. The docstring under a field is its `--help` text.

A recipe (YAML) has one section a command with these names as keys; flags override it.
"""

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import typing
from dataclasses import dataclass, field

from blipren.training.errors import UsageError


def positional(**keywords):
    """A field that is a positional argument on the command line."""
    return field(metadata={"positional": True}, **keywords)


def choice(*choices, default):
    """A field with a closed list of values."""
    return field(default=default, metadata={"choices": choices})


@functools.cache
def field_docs(settings_class: type) -> dict[str, str]:
    """The string literal under each field of a settings dataclass, its parents' included. Raises if one has none."""
    docs: dict[str, str] = {}
    for parent in reversed(settings_class.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0].body
        for statement, following in zip(body, body[1:] + [None]):
            if isinstance(statement, ast.AnnAssign):
                literal = following.value if isinstance(following, ast.Expr) else None
                if not (isinstance(literal, ast.Constant) and isinstance(literal.value, str)):
                    raise TypeError(f"{parent.__name__}.{statement.target.id} has no docstring under it")
                docs[statement.target.id] = " ".join(literal.value.split())
    return docs


@dataclass(kw_only=True)
class Settings:
    """Base of all settings: checks closed lists and types of plain fields when made, wherever the values come from."""

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            choices = f.metadata.get("choices")
            if choices and value not in choices:
                raise UsageError(f"{f.name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
            members = typing.get_args(hints[f.name]) or (hints[f.name],)
            plain = {m for m in members if m in (int, float, bool, str)}
            if (
                plain
                and not any(typing.get_origin(m) for m in members)
                and typing.get_origin(hints[f.name]) is not list
            ):
                if isinstance(value, int) and not isinstance(value, bool) and float in plain and int not in plain:
                    setattr(self, f.name, float(value))
                elif not (value is None and type(None) in members) and type(value) not in plain:
                    wanted = " or ".join(sorted(m.__name__ for m in plain))
                    raise UsageError(f"{f.name} is {value!r} ({type(value).__name__}); it must be {wanted}")


@dataclass(kw_only=True)
class NewSettings(Settings):
    """`blipren new`: vision encoder + LLM -> an untrained checkpoint."""

    out: str = positional()
    """Folder for the new checkpoint."""
    vision: str
    """Vision encoder: Hub id or folder, optionally with @revision."""
    llm: str
    """Causal language model: Hub id or folder, optionally with @revision."""
    connector: str = choice("qformer", "patches", default="qformer")
    """The bridge: Q-Former and projector, or the projector alone on every patch."""
    projector: str = choice("mlp", "mlp2", "moe", "linear", default="mlp")
    """From connector width to LLM width."""
    queries: int = 32
    """Number of learned queries, which is the number of visual tokens of the Q-Former."""
    qformer: dict = field(default_factory=dict)
    """Q-Former settings by name, such as {num_hidden_layers: 4, hidden_size: 256, norm_position: pre}."""
    qformer_init: str | None = None
    """BERT or DistilBERT checkpoint that the Q-Former starts from; its tokenizer is kept for the align stage."""
    projector_options: dict = field(default_factory=dict)
    """Projector settings by name, such as {num_experts: 4, experts_top_k: 2, projector_dropout: 0.1}."""
    vision_feature_layer: list[int] = field(default_factory=lambda: [-1])
    """Hidden layers of the vision encoder; several are concatenated along the width."""
    vision_feature_select: str = choice("patches", "full", default="patches")
    """Take class and register tokens off (patches) or keep them (full)."""
    image_processor: dict = field(default_factory=dict)
    """Image processor settings by name, such as {do_center_crop: false, size: {height: 224, width: 224}}."""
    prompts: list[str] = field(default_factory=list)
    """Caption prompts, drawn per row in training; the first one is used in inference."""
    system_prompts: list[str] = field(default_factory=list)
    """System prompts, drawn per image in training; the first one is used in inference. For LLMs with a chat template."""
    dtype: str = choice("auto", "float32", "bfloat16", "float16", default="auto")
    """Precision of the frozen parts; the connector stays in float32."""
    full: bool = False
    """Write a full checkpoint that holds the frozen parts too, instead of a bridge checkpoint."""
    seed: int = 0
    """Seed of the new weights."""


@dataclass(kw_only=True)
class DoctorSettings(Settings):
    """`blipren doctor`: proves that a checkpoint's parts work together, before training."""

    model: str = positional()
    """Checkpoint folder or Hub id."""
    steps: int = 120
    """Most optimizer updates of the eight-image overfitting test."""
    learning_rate: float = 2e-3
    """Learning rate of the eight-image overfitting test."""
    seed: int = 0
    """Seed of the eight drawn images and of the overfitting test."""


@dataclass(kw_only=True)
class EmbedSettings(Settings):
    """`blipren embed`: runs the frozen encoder once on every image and writes the feature cache."""

    model: str = positional()
    """Checkpoint folder or Hub id whose vision encoder embeds."""
    dataset: str = positional()
    """Anything that datasets.load_dataset reads: Hub id, folder with metadata.jsonl, Parquet, WebDataset tars; several
    as A,B (all rows of both) or A=2,B=1 (drawn in these proportions)."""
    cache: str = positional()
    """Folder of the feature cache."""
    image_column: str | None = None
    """Column with the images; found by name (image, jpg, file_name, ...) when not given."""
    caption_columns: list[str] = field(default_factory=list)
    """Columns with captions, texts or lists of texts: all of them are used. short_caption/caption takes the first that
    holds text, json.caption looks inside. Found by name when not given."""
    question_column: str | None = None
    """Column with questions (prompts); found by name when not given."""
    answer_column: str | None = None
    """Column with the answers to the questions; found by name when not given."""
    id_column: str | None = None
    """Column with the rows' ids; id, key or the file's name when not given."""
    split_column: str | None = None
    """Column that says train, validation or test; split when there is one."""
    status_column: str | None = None
    """Column of img2dataset that says whether the download succeeded; found by name when not given."""
    dataset_config: str | None = None
    """Configuration of a data set on the Hub."""
    streaming: bool | None = None
    """Read as a stream, without a copy of the data set on disk; by default local Parquet and tars only."""
    validation_share: float = 0.05
    """Share of images for validation, where neither a column nor the data set has splits."""
    test_share: float = 0.05
    """Share of images for the test split, likewise."""
    near_duplicates: str = choice("drop", "keep", default="drop")
    """Training images that are nearly a validation or test image: left out, or kept and only counted."""
    dtype: str = choice("float16", "float32", "int8", default="float16")
    """Type of the stored features; int8 has a scale for each token."""
    views: int = 1
    """Views of each image to embed: the image itself and deterministic random crops, among which training draws."""
    view_scale: float = 0.6
    """Least share of the image's area in a view."""
    view_flip: bool = True
    """Mirror half of the views, unless the image's texts name sides or digits."""
    min_words: int = 1
    """Caption filter: fewest words."""
    max_words: int | None = 256
    """Caption filter: most words; null switches off."""
    max_chars: int | None = 2000
    """Caption filter: most characters; null switches off."""
    max_repetition: float | None = 0.5
    """Caption filter: largest share of repeated three-word sequences; null switches off."""
    markup: bool = True
    """Caption filter: refuse HTML tags, entities, URLs and file names."""
    boilerplate: bool = True
    """Caption filter: refuse credits, shop words, camera file names, refusals of other models."""
    script: str | None = None
    """Caption filter: script of the letters, as Unicode names it (LATIN, CYRILLIC, CJK, ...)."""
    min_script_share: float = 0.9
    """Caption filter: least share of letters in that script."""
    tidy: bool = False
    """Captions: take away doubled white space and spaces before punctuation marks, as in "a dog runs ."."""
    duplicates: bool = True
    """Caption filter: keep one of equal captions of an image."""
    max_images_per_caption: int | None = None
    """Caption filter: refuse a caption that more images than this have word for word."""
    min_similarity: float | None = None
    """Caption filter, for SigLIP and CLIP: least cosine between image and caption in the encoder's own space."""
    keep_best: int | None = None
    """Caption filter, for SigLIP and CLIP: keep the k captions of an image that are most similar to it."""
    batch_size: int = 32
    """Views that the encoder takes at a time."""
    workers: int | None = None
    """Processes that decode; one less than the cores when not given, 0 for none."""
    rows_per_shard: int = 1024
    """Rows that are redone at most after a crash, and at most in an Arrow file."""
    device: str = "auto"
    """Where the encoder runs: auto, cpu, cuda, cuda:1, mps."""
    precision: str = choice("auto", "float32", "bfloat16", "float16", default="auto")
    """Precision that the encoder computes in: the checkpoint's own by default, float32 on a CPU."""
    engine: str = choice("local", "ray", default="local")
    """local: this machine; ray: Ray Data on a cluster (pip install blipren[ray]), where DATASET and CACHE may be on any
    file system that fsspec knows."""
    actors: int | None = None
    """Ray: encoders at work at the same time; one a GPU, or one for four cores, when not given."""
    limit: int | None = None
    """Take only the first rows."""
    seed: int = 0
    """Seed of a weighted mixture's order."""
    dry_run: bool = False
    """Only show what would be cached and what would be rejected; nothing is embedded or written."""
    verify: bool = False
    """Check every byte of a finished cache against its checksums, and write nothing."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("views", "batch_size", "rows_per_shard"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("validation_share", "test_share", "view_scale", "min_script_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if self.validation_share + self.test_share >= 1:
            raise UsageError(
                f"validation_share {self.validation_share} and test_share {self.test_share} leave nothing for training"
            )
        for name in ("workers", "limit", "keep_best", "actors"):
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must not be negative")


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


@dataclass(kw_only=True)
class TrainSettings(Settings):
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
    """Read images instead of cached features: CACHE is then a dataset, decoded and encoded as it is needed."""
    image_column: str | None = None
    """Column with the images, with --online; found by name when not given."""
    caption_columns: list[str] = field(default_factory=list)
    """Columns with captions, with --online; found by name when not given."""
    question_column: str | None = None
    """Column with questions, with --online; found by name when not given."""
    answer_column: str | None = None
    """Column with their answers, with --online; found by name when not given."""
    validation_share: float = 0.05
    """Share of images for validation where the data set says nothing, with --online."""
    test_share: float = 0.05
    """Share of images that are left out for a test, likewise."""
    augment: bool = False
    """Train on random crops, mirrored unless the texts name sides, with --online."""
    train_vision: bool = False
    """Train the vision encoder too, with --online."""
    precision: str = choice("auto", "fp32", "bf16", "fp16", default="auto")
    """Arithmetic: auto is bf16 where the GPU has it, else fp32. The trained connector's weights stay in fp32."""
    compile: bool = False
    """Compile the model (torch.compile)."""
    compile_backend: str = "inductor"
    """Backend of torch.compile."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    fsdp: bool = False
    """Under torchrun, shard model and optimizer over the processes (FSDP2) instead of copying them to each (DDP)."""
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
        if self.train_vision and not self.online:
            raise UsageError("train_vision needs online: cached features are those of the frozen encoder")
        if self.augment and not self.online:
            raise UsageError("augment needs online; cached views are made by `blipren embed --views`")


EVALUATION_TASKS = ("captioning", "vqa", "retrieval", "pope")


@dataclass(kw_only=True)
class EvaluateSettings(Settings):
    """`blipren evaluate`: metrics, predictions and a report on a held-out split. Run again, it goes on where it stopped."""

    model: str = positional()
    """Checkpoint folder or Hub id; - with --predictions, which needs no model."""
    dataset: str = positional()
    """Anything that datasets.load_dataset reads."""
    out: str = positional()
    """Folder for metrics.json, predictions.jsonl, predictions.csv and report.html."""
    tasks: list[str] = field(default_factory=lambda: ["captioning"])
    """What to evaluate: captioning, vqa (the data set's questions), retrieval (an aligned checkpoint), pope (yes/no
    questions about annotated objects)."""
    split: str | None = None
    """Split to evaluate on: train, validation or test; by default test, else validation."""
    limit: int | None = None
    """Only the first so many images of the split; all of them by default."""
    predictions: str | None = None
    """Score these captions instead of generating any: JSON lines with id and caption, or one JSON object."""
    before: str | None = None
    """An untrained or earlier checkpoint, or its evaluation folder: its captions stand beside in the report."""
    image_column: str | None = None
    """Column with the images; by default one that is known by its name."""
    caption_columns: list[str] = field(default_factory=list)
    """Columns with captions; by default those that are known by name."""
    question_column: str | None = None
    """Column with questions."""
    answer_column: str | None = None
    """Column with their answers."""
    id_column: str | None = None
    """Column with the rows' ids."""
    split_column: str | None = None
    """Column that says train, validation or test; split when there is one."""
    dataset_config: str | None = None
    """Configuration of a data set on the Hub."""
    validation_share: float = 0.05
    """Share of images for validation, where neither a column nor the data set has splits: as `embed` was told."""
    test_share: float = 0.05
    """Share of images for the test split, likewise."""

    prompt: str | None = None
    """Caption prompt; by default the model's own."""
    max_new_tokens: int = 64
    """Longest answer; what is cut off there is counted."""
    num_beams: int = 1
    """Beams; 1 is greedy."""
    length_penalty: float = 1.0
    """Above 1 beams prefer longer answers."""
    no_repeat_ngram_size: int = 0
    """Length of a word sequence that no answer may repeat; 0 allows all."""
    batch_size: int = 32
    """Answers that are generated together."""
    rerank: int = 0
    """Retrieval: candidates that the matching head re-orders; 0 for none."""
    probe: bool = True
    """Measure whether the model looks at its image: losses and scores with another image, a black one and none."""

    tokenizer: str = choice("auto", "java", "python", "whitespace", default="auto")
    """Tokenizer of the metrics; auto is Stanford's through Java, or without Java its equal in Python."""
    meteor: bool = True
    """Compute METEOR, where there is Java."""
    similarity: bool = True
    """Compute CLIPScore or SigLIPScore, where the vision encoder has a text tower."""
    resamples: int = 1000
    """Draws of the bootstrap that confidence intervals come from."""
    report: bool = True
    """Write report.html."""
    report_images: int = 60
    """Photos in the report's grid: the best, the worst and some between."""
    attention_images: int = 6
    """Photos in the report's attention explorer."""
    run: str | None = None
    """Run folder whose training curves the report shows; by default the checkpoint's own."""
    device: str = choice("auto", "cpu", "cuda", "mps", default="auto")
    """Where to compute."""
    seed: int = 0
    """Seed of other images, POPE's objects and the bootstrap."""

    def __post_init__(self):
        super().__post_init__()
        unknown = [task for task in self.tasks if task not in EVALUATION_TASKS]
        if unknown or not self.tasks:
            raise UsageError(f"tasks are {self.tasks}; each must be one of {', '.join(EVALUATION_TASKS)}")
        for name in ("batch_size", "max_new_tokens", "num_beams", "resamples"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.predictions is not None and self.tasks != ["captioning"]:
            raise UsageError("predictions are captions: they go with --tasks captioning alone")
        if self.before is not None and "captioning" not in self.tasks:
            raise UsageError("before compares captions: it goes with --tasks captioning")
        if self.predictions is None and self.model == "-":
            raise UsageError("a model is needed, unless captions are given by --predictions")


@dataclass(kw_only=True)
class CaptionSettings(Settings):
    """`blipren caption`: captions for images."""

    model: str = positional()
    """Checkpoint folder or Hub id."""
    images: list[str] = positional()
    """Image files."""
    prompt: str | None = None
    """Prompt or question; by default the model's own caption prompt."""
    json: bool = False
    """One JSON object a line instead of text."""
    max_new_tokens: int = 64
    """Longest answer."""
    num_beams: int = 1
    """Beams; 1 is greedy."""
    batch_size: int = 16
    """Images that are captioned together."""
    device: str = choice("auto", "cpu", "cuda", "mps", default="auto")
    """Where to compute."""


@dataclass(kw_only=True)
class CompareSettings(Settings):
    """`blipren compare`: paired comparison of two evaluation folders."""

    run_a: str = positional()
    """Evaluation folder of the first run."""
    run_b: str = positional()
    """Evaluation folder of the second run."""
    out: str | None = None
    """Folder for compare.json and compare.html; by default they lie in RUN_B."""
    resamples: int = 2000
    """Draws of the paired bootstrap."""
    images: int = 40
    """Photos in the page: those whose captions changed most."""
    seed: int = 0
    """Seed of the bootstrap."""


@dataclass(kw_only=True)
class PushSettings(Settings):
    """`blipren push`: publishes a checkpoint on the Hub."""

    model: str = positional()
    """Checkpoint folder."""
    repo: str = positional()
    """Hub repository: user/name."""
    full: bool = True
    """Publish a full checkpoint, which loads with nothing else."""
    bridge: bool = False
    """Publish only what was trained; others load the bases from the Hub. Refused where a base is a local folder."""
    private: bool = False
    """Make the repository private when it is created."""
    revision: str = "main"
    """Branch that receives the files once they are verified."""
    tag: str | None = None
    """Tag of the published commit, such as v1."""
    dry_run: bool = False
    """Print the files with their sizes, and send nothing."""
    run: str | None = None
    """Run folder with settings, curves and environment for the card; by default MODEL itself."""
    evaluation: str | None = None
    """Folder of `blipren evaluate`: metrics, limits and samples for the card."""
    cache: str | None = None
    """Feature cache that was trained on: data and filter counts for the card."""
    pictures: bool = True
    """Publish curves and the sample grid. Say --no-pictures where the photographs must not be passed on."""
    license: str | None = None
    """Licence of the published weights, as the Hub names it; by default the strictest of the parts."""
    vision_license: str | None = None
    """Licence of the vision encoder, where its own card does not say it."""
    llm_license: str | None = None
    """Licence of the language model, where its own card does not say it."""
    attempts: int = 3
    """Times that a failing Hub is tried before giving up; running the command again goes on from there."""

    def __post_init__(self):
        super().__post_init__()
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo):
            raise UsageError(f"repo is {self.repo!r}; it must be user/name")
        if self.bridge:
            self.full = False
        elif not self.full:
            raise UsageError("--no-full publishes nothing: say --bridge for the bridge alone")
        if self.attempts < 1:
            raise UsageError(f"attempts is {self.attempts}; it must be at least 1")
        if self.revision.startswith("refs/"):
            raise UsageError(f"revision is {self.revision!r}; it must be the name of a branch")


@dataclass(kw_only=True)
class ConvertSettings(Settings):
    """`blipren convert`: bridge checkpoint <-> full checkpoint."""

    model: str = positional()
    """Checkpoint folder or Hub id."""
    out: str = positional()
    """Folder for the new checkpoint."""
    to: str = choice("full", "bridge", default="full")
    """Kind of the new checkpoint: full holds everything, bridge only what was trained."""


@dataclass(kw_only=True)
class ImportSettings(Settings):
    """`blipren import`: a BLIP-2 or InstructBLIP model of transformers as a full checkpoint."""

    source: str = positional()
    """Folder or Hub id, optionally with @revision, such as Salesforce/blip2-opt-2.7b."""
    out: str = positional()
    """Folder for the checkpoint."""


@dataclass(kw_only=True)
class QuickstartSettings(Settings):
    """`blipren quickstart`: builds, trains, judges and uses a small model, without network or data."""

    out: str = "quickstart-out"
    """Folder for the scenes, the model, the summary and the pictures."""
    align: bool = True
    """Stage 1 in front of the captioning stage; recall before and after it is shown."""
    seed: int = 0
    """Seed of the scenes, of the new weights and of the training."""


@dataclass(frozen=True)
class Command:
    """A sub-command: its settings, the function that runs it (imported when called), its help line."""

    settings: type[Settings]
    function: str
    help: str


COMMANDS: dict[str, Command] = {
    "quickstart": Command(
        QuickstartSettings,
        "blipren.training.quickstart.run.quickstart",
        "build, train, judge and use a small model without network or data",
    ),
    "new": Command(
        NewSettings, "blipren.training.assemble.new", "join a vision encoder and an LLM into an untrained checkpoint"
    ),
    "doctor": Command(
        DoctorSettings, "blipren.training.doctor.doctor", "prove that a checkpoint's parts work together"
    ),
    "embed": Command(EmbedSettings, "blipren.training.data.embed.embed", "embed a dataset once into a feature cache"),
    "align": Command(
        AlignSettings, "blipren.training.align.align", "stage 1: train the Q-Former with ITC, ITM and ITG"
    ),
    "train": Command(
        TrainSettings, "blipren.training.caption.train", "stage 2: train the bridge to caption through the LLM"
    ),
    "evaluate": Command(
        EvaluateSettings, "blipren.training.evaluation.evaluate.evaluate", "metrics, predictions and a report"
    ),
    "compare": Command(
        CompareSettings, "blipren.training.evaluation.compare.compare", "compare two evaluations, paired"
    ),
    "caption": Command(CaptionSettings, "blipren.training.evaluation.captioning.caption", "caption images"),
    "convert": Command(ConvertSettings, "blipren.training.convert.convert", "bridge checkpoint <-> full checkpoint"),
    "import": Command(
        ImportSettings,
        "blipren.training.convert.import_model",
        "a BLIP-2 or InstructBLIP model as a checkpoint of ours",
    ),
    "push": Command(PushSettings, "blipren.training.publish.push", "publish a checkpoint on the Hub"),
}
