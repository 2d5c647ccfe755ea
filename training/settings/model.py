"""Settings of the commands that make, check and change checkpoints."""

from dataclasses import dataclass, field

from blipren.training.settings.base import Settings, choice, positional


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
