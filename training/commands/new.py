"""Join a vision encoder and a language model into an untrained checkpoint."""

from dataclasses import dataclass, field
from pathlib import Path

from blipren.training.arguments import check_base_model, constructor_arguments
from blipren.training.errors import UsageError, UserError, one_line
from blipren.training.files import check_new_folder, complete_or_absent_folder
from blipren.training.settings import Settings, choice, positional


def check_option_names(setting: str, given: dict, arguments: list[str], prefixes: tuple[str, ...]) -> None:
    """Raise `UsageError` if `given` has a name that is not a argument of the config with one of the prefixes."""
    known = sorted(name for name in arguments if name.startswith(prefixes))
    for name in given:
        if name not in known:
            raise UsageError(f"unknown name {name!r} in {setting}; names are: {', '.join(known)}")


@dataclass(kw_only=True)
class CheckpointSettings(Settings):
    """Checkpoint."""

    dtype: str = choice("auto", "float32", "bfloat16", "float16", default="auto")
    """Precision of the frozen parts; the connector stays in float32."""
    full: bool = False
    """Write a full checkpoint that holds the frozen parts too, instead of a bridge checkpoint."""
    seed: int = 0
    """Seed of the new weights."""


@dataclass(kw_only=True)
class PromptSettings(Settings):
    """Prompts."""

    prompts: list[str] = field(default_factory=list)
    """Caption prompts. Training draws one per row; inference uses the first one."""
    system_prompts: list[str] = field(default_factory=list)
    """System prompts, for LLMs with a chat template. Training draws one per image; inference uses the first one."""


@dataclass(kw_only=True)
class VisionSettings(Settings):
    """Vision features."""

    vision_feature_layer: list[int] = field(default_factory=lambda: [-1])
    """Hidden layers of the vision encoder; several are concatenated along the width."""
    vision_feature_select: str = choice("patches", "full", default="patches")
    """Take class and register tokens off (patches) or keep them (full)."""
    scales: list[int] = field(default_factory=lambda: [1])
    """The image at these multiples of the encoder's input size, cut into pieces of that size: 1 2, or 1 2 3."""
    scale_join: str = choice("channels", "sequence", default="channels")
    """Scales averaged down onto one grid and concatenated along the width (S2), or all patches one behind the other."""
    tiles: int | None = None
    """Instead of scales: an overview and the grid of at most so many tiles that fits the image's shape best."""
    frames: int | None = None
    """Take videos too: so many frames, sampled evenly by time."""
    frame_tokens: bool = False
    """The Q-Former reads each frame for itself and gives --queries tokens a frame, instead of --queries for all frames."""
    time_embedding: str = choice("sinusoidal", "learned", "seconds", default="sinusoidal")
    """How a Q-Former that reads all frames at once knows their times: by place (sinusoidal, or learned), or by seconds."""
    image_processor: dict = field(default_factory=dict)
    """Image processor settings by name, such as {do_center_crop: false, size: {height: 224, width: 224}}; those of a
    second encoder under second."""


@dataclass(kw_only=True)
class ConnectorSettings(Settings):
    """Connector."""

    connector: str = choice("qformer", "patches", default="qformer")
    """The bridge: Q-Former and projector, or the projector alone on every patch."""
    projector: str = choice("mlp", "mlp2", "moe", "linear", default="mlp")
    """From connector width to LLM width."""
    queries: int = 32
    """Number of learned queries, which is the number of visual tokens of the Q-Former."""
    qformer: dict = field(default_factory=dict)
    """Q-Former settings by name, such as {num_hidden_layers: 4, hidden_size: 256, norm_position: pre}."""
    qformer_init: str | None = None
    """What the Q-Former starts from, with its tokenizer: BERT or DistilBERT, for the align stage; or a checkpoint of
    `blipren align`, whose Q-Former is used with another language model. Its encoder and sizes are taken, too."""
    projector_options: dict = field(default_factory=dict)
    """Projector settings by name, such as {num_experts: 4, experts_top_k: 2, projector_dropout: 0.1}."""

    def __post_init__(self):
        super().__post_init__()
        projector_prefixes = ("projector_", "num_experts", "experts_", "router_")
        arguments = constructor_arguments("qformer_configuration_blipren.py", "BliprenQFormerConfig")
        check_option_names("qformer", self.qformer, arguments, ("",))
        arguments = constructor_arguments("configuration_blipren.py", "BliprenConfig")
        check_option_names("projector_options", self.projector_options, arguments, projector_prefixes)


@dataclass(kw_only=True)
class NewSettings(CheckpointSettings, PromptSettings, VisionSettings, ConnectorSettings):
    """`blipren new`: vision encoder + LLM -> an untrained checkpoint."""

    out: str = positional()
    """Folder for the new checkpoint."""
    vision: list[str] | str | None = None
    """Vision encoder: Hub id or folder, optionally with @revision; by default that of an aligned --qformer-init. Two are
    used side by side: their patch features are brought to the first one's grid and concatenated."""
    llm: str
    """Causal language model: Hub id or folder, optionally with @revision."""

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.vision, str):
            self.vision = [self.vision]
        self.vision = self.vision or []
        if not self.vision and self.qformer_init is None:
            raise UsageError("blipren new needs --vision, or a --qformer-init of `blipren align`")
        if len(self.vision) > 2:
            raise UsageError(f"vision names {len(self.vision)} encoders; a model has one or two")
        if self.scales[0] != 1 or any(b <= a for a, b in zip(self.scales, self.scales[1:])):
            raise UsageError(f"scales are {self.scales}; they must ascend from 1, such as 1 2 or 1 2 3")
        if self.frames is not None and (self.frames < 1 or self.tiles is not None):
            raise UsageError(f"frames is {self.frames}; it must be at least 1, and goes with no tiles")
        if self.tiles is not None and (self.tiles < 2 or self.scales != [1]):
            raise UsageError(f"tiles is {self.tiles}; it must be at least 2, and goes with no scale but 1")


def describe_pieces(config) -> str:
    """Return in words what the patch features are made of beside one encoder's grid."""
    words = f" at scales {', '.join(map(str, config.vision_scales))}" if len(config.vision_scales) > 1 else ""
    words += f", joined along the {config.vision_join}" if words else ""
    words += f", an overview and at most {config.vision_tiles} tiles" if config.vision_tiles else ""
    words += f", {config.num_frames} frames of a video" if config.num_frames else ""
    words += " of two encoders" if config.second_vision_config is not None else ""
    return words + (f": features {config.vision_hidden_size} wide" if words else "")


def run(settings: NewSettings) -> None:
    """Write an untrained checkpoint; OUT is complete or absent.

    Raises:
        UserError: OUT is not free, or a base model is not there or does not fit.
    """
    out = Path(settings.out)
    check_new_folder(out)
    for name in filter(None, (*settings.vision, settings.llm, settings.qformer_init)):
        check_base_model(name)

    import torch
    from transformers import AutoTokenizer, set_seed

    from blipren import BliprenForConditionalGeneration, BliprenProcessor
    from blipren.configuration_blipren import split_revision
    from blipren.training.engine.aligned_qformer import AlignedQFormer, is_our_checkpoint

    aligned = None
    if settings.qformer_init is not None and is_our_checkpoint(settings.qformer_init):
        aligned = AlignedQFormer.load(settings.qformer_init)
        settings = aligned.fill_settings(settings)
    elif not settings.vision:
        raise UserError(f"{settings.qformer_init} is not a checkpoint of `blipren align`: name a --vision encoder")

    kind = "full" if settings.full else "bridge"
    connector = f"{settings.connector}/{settings.projector}"
    encoders = " and ".join(settings.vision)
    print(f"new: {encoders} + {connector} + {settings.llm} -> {out} ({kind} checkpoint)")
    set_seed(settings.seed)
    layers = settings.vision_feature_layer
    shared = {
        "connector": settings.connector,
        "num_queries": settings.queries,
        "vision_feature_layer": layers[0] if len(layers) == 1 else layers,
        "vision_feature_select": settings.vision_feature_select,
        "scales": settings.scales,
        "scale_join": settings.scale_join,
        "tiles": settings.tiles,
        "frames": settings.frames,
        "frame_tokens": settings.frame_tokens,
        "time_embedding": settings.time_embedding,
        "image_processor_options": settings.image_processor,
    }
    bert = None if aligned is not None else settings.qformer_init
    text_side = {"use_text": True} if bert is not None else {}
    try:
        model = BliprenForConditionalGeneration.from_vision_text_pretrained(
            settings.vision,
            settings.llm,
            **shared,
            projector=settings.projector,
            projector_options=settings.projector_options,
            qformer=text_side | settings.qformer,
            qformer_init=bert,
            dtype="auto" if settings.dtype == "auto" else getattr(torch, settings.dtype),
        )
        processor = BliprenProcessor.from_vision_text_pretrained(
            settings.vision,
            settings.llm,
            **shared,
            prompts=settings.prompts or None,
            system_prompts=settings.system_prompts or None,
        )
        if bert is not None:
            name, revision = split_revision(bert)
            processor.qformer_tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot join {encoders} and {settings.llm}: {one_line(error)}") from error

    if aligned is not None:
        model = aligned.give_to(model, processor)
        print(f"Q-Former, text side, its tokenizer and heads from {aligned.name}")

    with complete_or_absent_folder(out) as folder:
        if settings.full:
            model.save_pretrained(folder)
        else:
            model.save_bridge(folder)
        processor.save_pretrained(folder)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    grid = "x".join(map(str, model.config.vision_grid)) if model.config.vision_grid else "variable"
    print(
        f"{model.describe_trainable()}\n"
        f"patch grid {grid}{describe_pieces(model.config)}, {model.config.num_prefix_tokens} prefix tokens left out, "
        f"{model.config.num_visual_tokens or 'as many as patches'} visual tokens an image"
        f"{f', {processor.num_video_tokens} a video' if processor.frames_per_video else ''}\n"
        f"prompt: {processor.prompt_text()!r}\n"
        f"checkpoint: {out} ({size / 2**20:.1f} MiB). Next: blipren doctor {out}"
    )
