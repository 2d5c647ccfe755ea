"""Join a vision encoder and a language model into an untrained checkpoint."""

from dataclasses import dataclass, field

from blipren.training.settings import Settings, choice, positional


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


def run(settings: NewSettings) -> int | None:
    """Run the command. Returns the exit status."""
    from blipren.training.hub.assemble import new

    return new(settings)
