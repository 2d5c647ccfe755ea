"""Configuration of BLIPren: a frozen vision encoder, a Q-Former and projector, any causal language model."""

import os
import shutil
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from .base_models_blipren import load_base_code
from .qformer_configuration_blipren import BliprenQFormerConfig

# version of the checkpoint format; raised when older code would load a new checkpoint wrongly instead of failing
FORMAT = 1
HEADS = ("contrast", "matching", "generation")  # of stage 1: ITC, ITM, ITG
AUTO_MAP = {
    "AutoConfig": "configuration_blipren.BliprenConfig",
    "AutoModel": "modeling_blipren.BliprenForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_blipren.BliprenForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_blipren.BliprenForConditionalGeneration",
    "AutoProcessor": "processing_blipren.BliprenProcessor",
}
CUSTOM_PIPELINES = {
    "image-to-text": {
        "impl": "pipeline_blipren.BliprenImageToTextPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
}


def split_revision(model_id: str) -> tuple[str, str | None]:
    """Split `"user/name@revision"` into id and revision; the revision of a folder is `None`."""
    if os.path.isdir(model_id) or "@" not in model_id:
        return model_id, None
    name, _, revision = model_id.rpartition("@")
    return name, revision


def copy_code_files(save_directory: str | os.PathLike) -> None:
    """Copy the model code into a checkpoint folder.

    transformers copies the files of one auto class a model; our `auto_map` has several.
    """
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted(Path(__file__).parent.glob("*_blipren.py")):
        target = folder / source.name
        if not target.exists() or not target.samefile(source):
            shutil.copyfile(source, target)


def check_pieces(scales: list[int], tiles: int | None) -> None:
    """Raise `ValueError` unless scales are ascending integers from 1, and tiles (two or more) come without scales."""
    if scales[:1] != [1] or any(b <= a for a, b in zip(scales, scales[1:])):
        raise ValueError(f"scales are {scales}; they must ascend from 1, such as 1 2 or 1 2 3")
    if tiles is not None and (tiles < 2 or scales != [1]):
        raise ValueError(f"tiles is {tiles} with scales {scales}; it must be at least 2, with no scale but 1")


def count_pieces(scales: list[int], tiles: int | None) -> int:
    """Return the pieces of an image: the squares of all scales, or an overview and at most `tiles` tiles."""
    return sum(scale * scale for scale in scales) if tiles is None else 1 + tiles


class BliprenConfig(PreTrainedConfig):
    r"""Configuration of a BLIPren model.

    Args:
        vision_config (`PreTrainedConfig` or `dict`): config of the vision encoder; SigLIP-B/16-224 by default.
        text_config (`PreTrainedConfig` or `dict`): config of the language model; Llama by default.
        qformer_config (`BliprenQFormerConfig` or `dict`): config of the Q-Former.
        connector (`str`, defaults to `"qformer"`): `"qformer"` (Q-Former and projector) or `"patches"` (projector on
            every patch, as LLaVA, https://arxiv.org/abs/2304.08485).
        projector (`str`, defaults to `"mlp"`): `"linear"`, `"mlp2"` (two layers), `"mlp"` (pre-norm residual MLP) or
            `"moe"` (mixture of experts, routed per image).
        projector_hidden_size (`int`, *optional*): hidden width; 4 x LLM width (`mlp`, `moe`) or LLM width (`mlp2`).
        projector_hidden_act (`str`, defaults to `"gelu"`): activation.
        projector_dropout (`float`, defaults to 0.1): dropout of `mlp`.
        projector_mid_norm (`bool`, defaults to `False`): a layer norm between the two layers of `mlp2`.
        num_experts (`int`, defaults to 4): experts of `moe`.
        experts_top_k (`int`, *optional*): experts used per image, their weights normalised to 1 (a single one keeps its
            probability); `None` mixes all of them.
        router_balance_weight, router_z_weight (`float`): weights of the load-balancing loss (Switch,
            https://arxiv.org/abs/2101.03961) and the router z-loss (ST-MoE, https://arxiv.org/abs/2202.08906).
        router_noise (`float`, defaults to 0.0): standard deviation of noise on router logits, in training only.
        router_input (`str`, defaults to `"mean"`): what the router reads of an image: the `"mean"` of its patch features,
            or the `"first"` one (the BLIPren notebooks).
        vision_feature_layer (`int` or `list[int]`, defaults to -1): -1 is the encoder's `last_hidden_state`, any other
            number an index into its `hidden_states`; several layers are concatenated along the width.
        vision_feature_select (`str`, defaults to `"patches"`): `"patches"` drops class and register tokens, `"full"`
            keeps them.
        num_prefix_tokens (`int`, defaults to 0): class and register tokens in front of the patches: sequence length minus
            size of the grid, measured when a model is made.
        vision_grid (`list[int]`, *optional*): `[height, width]` of the patch grid, measured; `None` if images differ.
        vision_hidden_size (`int`, *optional*): width of the patch features as the connector takes them: of all layers,
            encoders and, joined along the channels, scales.
        vision_scales (`list[int]`, defaults to `[1]`): the image at each multiple of the encoder's own input size, cut
            into pieces of that size.
        vision_join (`str`, defaults to `"channels"`): how scales are joined, see [`join_pieces`].
        vision_tiles (`int`, *optional*): instead of scales: an overview and at most so many tiles, along the sequence.
        second_vision_config (`PreTrainedConfig` or `dict`, *optional*): config of a second vision encoder, whose patch
            features are interpolated to the grid of the first and concatenated to its own.
        num_frames (`int`, *optional*): frames of a video, for a model that takes videos.
        frame_tokens (`bool`, defaults to `False`): the Q-Former reads each frame for itself, and a video has as many visual
            tokens a frame as an image; otherwise it reads all frames at once.
        video_token_id (`int`, *optional*): id of the placeholder of a video in `input_ids`.
        second_num_prefix_tokens, second_vision_grid, second_hidden_size: prefix tokens, patch grid and width of the patch
            features of the second encoder, measured.
        image_token_id (`int`): id of the placeholder in `input_ids` that image features replace.
        num_visual_tokens (`int`, *optional*): visual tokens an image; `None` if images differ.
        image_text_hidden_size (`int`, defaults to 256): width of the image and text embeddings of
            `BliprenForImageTextRetrieval`.
        itc_pooling (`str`, defaults to `"max"`): similarity of an image and a text in that model: `"max"` over queries
            (BLIP-2) or that of the `"mean"` of the queries.
        trained_heads (`list[str]`, *optional*): heads of stage 1 that were trained, of `"contrast"`, `"matching"` and
            `"generation"`. `None` means unknown, in checkpoints older than this field: all heads may then be used.
        qformer_reads_prompt (`bool`, defaults to `False`): the Q-Former reads the prompt beside the image, through
            `qformer_input_ids` of its own tokenizer (InstructBLIP, https://arxiv.org/abs/2305.06500).
        base_models (`dict`, *optional*): sources of the frozen parts: `{"vision": {"id", "revision", "sha256",
            "sampled_sha256"}, "llm": {...}}`, and `"second_vision"` with two encoders. A part with `"trained": true` was
            trained since: a bridge holds its weights.
        checkpoint_type (`str`, defaults to `"full"`): `"full"`, or `"bridge"` for a folder with only what was trained.
        format_version (`int`): version of the checkpoint format; a newer one than this code's is refused.

    Raises:
        ValueError: for a value that is not allowed, or a base model whose code is not trusted.
    """

    model_type = "blipren"
    sub_configs = {
        "vision_config": AutoConfig,
        "second_vision_config": AutoConfig,
        "text_config": AutoConfig,
        "qformer_config": BliprenQFormerConfig,
    }

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        qformer_config=None,
        connector: str = "qformer",
        projector: str = "mlp",
        projector_hidden_size: int | None = None,
        projector_hidden_act: str = "gelu",
        projector_dropout: float = 0.1,
        projector_mid_norm: bool = False,
        num_experts: int = 4,
        experts_top_k: int | None = None,
        router_balance_weight: float = 0.01,
        router_z_weight: float = 0.001,
        router_noise: float = 0.0,
        router_input: str = "mean",
        vision_feature_layer: int | list[int] = -1,
        vision_feature_select: str = "patches",
        num_prefix_tokens: int = 0,
        vision_grid: list[int] | None = None,
        vision_hidden_size: int | None = None,
        vision_scales: list[int] | None = None,
        vision_join: str = "channels",
        vision_tiles: int | None = None,
        second_vision_config=None,
        second_num_prefix_tokens: int = 0,
        second_vision_grid: list[int] | None = None,
        second_hidden_size: int | None = None,
        num_frames: int | None = None,
        frame_tokens: bool = False,
        video_token_id: int | None = None,
        image_token_id: int | None = None,
        num_visual_tokens: int | None = None,
        image_text_hidden_size: int = 256,
        itc_pooling: str = "max",
        trained_heads: list[str] | None = None,
        qformer_reads_prompt: bool = False,
        base_models: dict | None = None,
        checkpoint_type: str = "full",
        format_version: int = FORMAT,
        **kwargs,
    ):
        if format_version > FORMAT:
            raise ValueError(
                f"the checkpoint has format {format_version}, and this BLIPren reads formats up to {FORMAT}: update the "
                "package blipren, or uninstall it and load the checkpoint with trust_remote_code=True"
            )
        for name, value, allowed in (
            ("itc_pooling", itc_pooling, ("max", "mean")),
            ("connector", connector, ("qformer", "patches")),
            ("projector", projector, ("linear", "mlp2", "mlp", "moe")),
            ("router_input", router_input, ("mean", "first")),
            ("vision_feature_select", vision_feature_select, ("patches", "full")),
            ("vision_join", vision_join, ("channels", "sequence")),
            ("checkpoint_type", checkpoint_type, ("full", "bridge")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")
        if unknown := set(trained_heads or ()) - set(HEADS):
            raise ValueError(f"trained_heads has {sorted(unknown)[0]!r}; the heads are {', '.join(map(repr, HEADS))}")
        if experts_top_k is not None and not 1 <= experts_top_k <= num_experts:
            raise ValueError(f"experts_top_k {experts_top_k} must lie between 1 and num_experts {num_experts}")
        parts = (("vision", vision_config), ("second_vision", second_vision_config), ("llm", text_config))
        for part, sub_config in parts:
            if base_models and isinstance(sub_config, dict):
                load_base_code(part, sub_config, base_models[part]["id"], base_models[part]["revision"])
        self.vision_config = _build_sub_config(vision_config, "siglip_vision_model", {"vision_use_head": False})
        self.second_vision_config = None
        if second_vision_config is not None:
            self.second_vision_config = _build_sub_config(second_vision_config, "siglip_vision_model", {})
        self.text_config = _build_sub_config(text_config, "llama", {})
        self.vision_hidden_size = (
            vision_hidden_size if vision_hidden_size is not None else _vision_hidden_size(self.vision_config)
        )
        if isinstance(qformer_config, dict):
            qformer_config = BliprenQFormerConfig(**qformer_config)
        elif qformer_config is None:
            qformer_config = BliprenQFormerConfig(encoder_hidden_size=self.vision_hidden_size)
        self.qformer_config = qformer_config
        self.connector = connector
        self.projector = projector
        self.projector_hidden_size = projector_hidden_size
        self.projector_hidden_act = projector_hidden_act
        self.projector_dropout = projector_dropout
        self.projector_mid_norm = projector_mid_norm
        self.num_experts = num_experts
        self.experts_top_k = experts_top_k
        self.router_balance_weight = router_balance_weight
        self.router_z_weight = router_z_weight
        self.router_noise = router_noise
        self.router_input = router_input
        self.vision_feature_layer = vision_feature_layer
        self.vision_feature_select = vision_feature_select
        self.num_prefix_tokens = num_prefix_tokens
        self.vision_grid = vision_grid
        self.vision_scales = vision_scales or [1]
        self.vision_join = vision_join
        self.vision_tiles = vision_tiles
        check_pieces(self.vision_scales, vision_tiles)
        self.num_frames = num_frames
        self.frame_tokens = frame_tokens
        self.video_token_id = video_token_id
        self.second_num_prefix_tokens = second_num_prefix_tokens
        self.second_vision_grid = second_vision_grid
        self.second_hidden_size = second_hidden_size
        # an id beyond the vocabulary is always free, and the model never embeds the placeholder
        self.image_token_id = image_token_id if image_token_id is not None else self.text_config.vocab_size
        if num_visual_tokens is None and connector == "qformer":
            num_visual_tokens = self.qformer_config.num_query_tokens
        self.num_visual_tokens = num_visual_tokens
        self.image_text_hidden_size = image_text_hidden_size
        self.itc_pooling = itc_pooling
        self.trained_heads = trained_heads
        if qformer_reads_prompt and not (connector == "qformer" and self.qformer_config.use_text):
            raise ValueError("qformer_reads_prompt needs a Q-Former with a text side: qformer_config.use_text")
        self.qformer_reads_prompt = qformer_reads_prompt
        self.base_models = base_models
        self.checkpoint_type = checkpoint_type
        self.format_version = format_version
        # the head is tied if the language model's own is
        kwargs["tie_word_embeddings"] = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)

    @property
    def pieces_are_a_sequence(self) -> bool:
        """Whether the patches of an image's pieces stand one behind the other."""
        return self.vision_tiles is not None or (len(self.vision_scales) > 1 and self.vision_join == "sequence")

    @property
    def patches_per_frame(self) -> int | None:
        """Patch features of an image, or of a frame of a video; `None` if images differ."""
        if self.vision_grid is None or self.vision_tiles is not None:
            return None
        prefix = self.num_prefix_tokens if self.vision_feature_select == "full" else 0
        pieces = count_pieces(self.vision_scales, None) if self.pieces_are_a_sequence else 1
        return pieces * (self.vision_grid[0] * self.vision_grid[1] + prefix)

    @property
    def has_frame_times(self) -> bool:
        """Whether patch features have a last column with the time of their frame in seconds."""
        return self.connector == "qformer" and self.qformer_config.time_embedding == "seconds"

    @property
    def patch_feature_size(self) -> int:
        """Width of patch features, the column of times included."""
        return self.vision_hidden_size + self.has_frame_times

    def count_visual_tokens(self, num_patches: int) -> int:
        """Return the visual tokens of an image, or of a video, with this many patch features."""
        if self.connector == "patches":
            return num_patches
        frames = num_patches // self.patches_per_frame if self.frame_tokens else 1
        return frames * self.qformer_config.num_query_tokens

    @property
    def connector_hidden_size(self) -> int:
        """Width of the projector's input."""
        return self.qformer_config.hidden_size if self.connector == "qformer" else self.vision_hidden_size

    def check_trained_heads(self, *heads: str) -> None:
        """Raise `ValueError` for a head of stage 1 that is not in `trained_heads`; `None` allows all of them."""
        for head in heads:
            if self.trained_heads is not None and head not in self.trained_heads:
                flag = {"contrast": "itc", "matching": "itm", "generation": "itg"}[head]
                raise ValueError(
                    f"the {head} head of this model was never trained (trained_heads in its config.json: "
                    f"{', '.join(self.trained_heads) or 'none'}); train it with `blipren align --{flag}-weight 1`"
                )


def _build_sub_config(config, default_model_type: str, defaults: dict):
    if config is None:
        return AutoConfig.for_model(default_model_type, **defaults)
    if isinstance(config, dict):
        return AutoConfig.for_model(**{"model_type": default_model_type, **config})
    return config


def _vision_hidden_size(vision_config) -> int:
    """Return the width of an encoder's last hidden state by its config; `from_vision_text_pretrained` measures it."""
    hidden_sizes = getattr(vision_config, "hidden_sizes", None)
    return hidden_sizes[-1] if hidden_sizes else vision_config.hidden_size


# `transformers serve` looks up model types in this table, also those of remote code
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault("blipren", "BliprenForConditionalGeneration")

__all__ = ["BliprenConfig"]
