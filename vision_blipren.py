"""Patch features `(num_images, num_patches, vision_hidden)` of any vision encoder of transformers."""

import contextlib
import json
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig

from .configuration_blipren import check_pieces, count_pieces, split_revision


@dataclass(frozen=True)
class BliprenVisionShape:
    """Shape of an encoder's output for one image of its processor, measured when a model is made.

    Attributes:
        grid: `(height, width)` of the patch grid; `None` if images differ (NaFlex).
        num_prefix_tokens: class and register tokens in front of the patches: sequence length minus grid.
        hidden_size: width of the patch features, over all chosen layers.
    """

    grid: tuple[int, int] | None
    num_prefix_tokens: int
    hidden_size: int

    def num_patches(self, select: str) -> int | None:
        """Return the number of patch features an image, including the prefix if `select` is `"full"`; `None` for NaFlex."""
        if self.grid is None:
            return None
        return self.grid[0] * self.grid[1] + (self.num_prefix_tokens if select == "full" else 0)


def load_vision_config(vision: str, **hub_kwargs) -> PreTrainedConfig:
    """Load the config of a vision encoder; of a two-tower model such as SigLIP or CLIP that of the image tower."""
    config = AutoConfig.from_pretrained(vision, **hub_kwargs)
    config = getattr(config, "vision_config", config)
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False  # the pooling head is not used, and vLLM cannot run it
    return config


def _select_layers(outputs, layers: int | list[int]) -> list[torch.Tensor]:
    states = []
    for layer in [layers] if isinstance(layers, int) else layers:
        if layer == -1:
            states.append(outputs.last_hidden_state)
            continue
        if outputs.hidden_states is None or not -len(outputs.hidden_states) <= layer < len(outputs.hidden_states):
            count = 0 if outputs.hidden_states is None else len(outputs.hidden_states)
            raise ValueError(f"vision_feature_layer is {layer}, and the encoder has {count} hidden states")
        states.append(outputs.hidden_states[layer])
    return states


def compute_patch_features(
    vision_tower: nn.Module,
    pixel_values: torch.Tensor,
    layers: int | list[int] = -1,
    num_prefix_tokens: int = 0,
    **vision_inputs,
) -> torch.Tensor:
    """Run a vision encoder and select its patch features.

    Args:
        vision_tower: the encoder.
        pixel_values: `(num_images, channels, height, width)`, or patches `(num_images, num_patches, patch_width)`.
        layers: hidden layer, or several to be concatenated; feature maps are pooled to the grid of the last one.
        num_prefix_tokens: tokens to drop in front of the patches.
        vision_inputs: other inputs of the encoder (`pixel_attention_mask` and `spatial_shapes` for NaFlex).

    Returns:
        `(num_images, num_patches, vision_hidden)`.

    Raises:
        ValueError: for a layer that the encoder does not have.
    """
    return select_patch_features(
        run_vision_encoder(vision_tower, pixel_values, layers, **vision_inputs), layers, num_prefix_tokens
    )


def run_vision_encoder(vision_tower: nn.Module, pixel_values: torch.Tensor, layers: int | list[int] = -1, **inputs):
    """Return the encoder's own output, with hidden states if `layers` needs them."""
    if layers != -1 and layers != [-1]:
        inputs["output_hidden_states"] = True
    return vision_tower(pixel_values, return_dict=True, **inputs)


def select_patch_features(outputs, layers: int | list[int] = -1, num_prefix_tokens: int = 0) -> torch.Tensor:
    """Select patch features `(num_images, num_patches, vision_hidden)` from an encoder's output."""
    states = _select_layers(outputs, layers)
    if states[-1].dim() == 4:  # feature maps [B, C, H, W]
        grid = states[-1].shape[-2:]
        states = [F.adaptive_avg_pool2d(s, grid) if s.shape[-2:] != grid else s for s in states]
        return torch.cat([s.flatten(2).transpose(1, 2) for s in states], dim=-1)
    return torch.cat(states, dim=-1)[:, num_prefix_tokens:]


def used_parameters(
    vision_tower: nn.Module, image_inputs: dict[str, torch.Tensor], layers: int | list[int]
) -> set[str]:
    """Return the names of the parameters that patch features depend on, found by a backward pass."""
    parameters = dict(vision_tower.named_parameters())
    inputs = dict(image_inputs)
    pixel_values = inputs.pop("pixel_values").to(vision_tower.dtype)
    features = compute_patch_features(vision_tower.eval(), pixel_values, layers, **inputs)
    gradients = torch.autograd.grad(features.float().sum(), list(parameters.values()), allow_unused=True)
    return {name for name, gradient in zip(parameters, gradients) if gradient is not None}


@contextlib.contextmanager
def _first_patch_grid(vision_tower: nn.Module):
    """Record the output size of the convolutions that cut the image into patches (kernel = stride > 1)."""
    grids: list[tuple[int, int]] = []
    handles = [
        module.register_forward_hook(lambda _, __, output: grids.append(tuple(output.shape[-2:])))
        for module in vision_tower.modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride and module.kernel_size[0] > 1
    ]
    try:
        yield grids
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure_vision(
    vision_config: PreTrainedConfig, image_inputs: dict[str, torch.Tensor], layers: int | list[int] = -1
) -> BliprenVisionShape:
    """Measure the shape of an encoder's output on the meta device, without weights.

    Args:
        vision_config: config of the encoder.
        image_inputs: output of the image processor for one image.
        layers: as in [`compute_patch_features`].

    Raises:
        ValueError: when the encoder has no patch grid, or one that does not fit its sequence length.
    """
    name = vision_config.model_type
    with torch.device("meta"):
        vision_tower = AutoModel.from_config(vision_config, attn_implementation="eager").eval()
    inputs = {key: value.to("meta") for key, value in image_inputs.items()}
    pixel_values = inputs.pop("pixel_values")
    if "spatial_shapes" in inputs:  # NaFlex: images differ in patches, and positions need more than the meta device
        states = [None] * (1 if isinstance(layers, int) else len(layers))
        return BliprenVisionShape(None, 0, vision_config.hidden_size * len(states))
    needs_hidden_states = layers != -1 and layers != [-1]
    with _first_patch_grid(vision_tower) as grids:
        outputs = vision_tower(pixel_values, output_hidden_states=needs_hidden_states, return_dict=True)
    states = _select_layers(outputs, layers)
    if states[-1].dim() == 4:
        return BliprenVisionShape(tuple(states[-1].shape[-2:]), 0, sum(s.shape[1] for s in states))
    length, width = states[-1].shape[1], sum(s.shape[-1] for s in states)
    if not grids:
        raise ValueError(f"vision encoder {name!r} has no convolution into patches, so its patch grid is unknown")
    rows, columns = grids[0]
    if length < rows * columns:  # hierarchical encoders merge patches by a square number
        merge = math.isqrt(rows * columns // length)
        if merge * merge * length != rows * columns:
            raise ValueError(f"vision encoder {name!r} has {length} tokens, which do not fit a {rows}x{columns} grid")
        return BliprenVisionShape((rows // merge, columns // merge), 0, width)
    return BliprenVisionShape((rows, columns), length - rows * columns, width)


@dataclass(frozen=True)
class BliprenVisionSource:
    """A vision encoder to be joined: id, revision, config, the shape of its output, and inputs of a blank image."""

    name: str
    revision: str | None
    config: PreTrainedConfig
    shape: BliprenVisionShape
    image_inputs: dict[str, torch.Tensor]


@dataclass(frozen=True)
class BliprenVisionSetup:
    """One or two vision encoders, and how images are given to them.

    Attributes:
        sources: the encoders.
        image_processor: that of the first encoder, with the settings of [`with_pieces`].
        num_pieces: pieces of an image along the sequence.
        num_patches: patch features an image; `None` if images differ (NaFlex, tiles).
        hidden_size: width of the patch features.
    """

    sources: list[BliprenVisionSource]
    image_processor: Any
    num_pieces: int
    num_patches: int | None
    hidden_size: int


def load_vision_setup(
    vision: str | os.PathLike | list,
    layers: int | list[int] = -1,
    select: str = "patches",
    scales: list[int] | None = None,
    join: str = "channels",
    tiles: int | None = None,
    image_processor_options: dict | None = None,
    **hub_kwargs,
) -> BliprenVisionSetup:
    """Load image processors and configs of one or two vision encoders, and measure what they give.

    Args:
        vision: Hub id (perhaps `id@revision`) or folder, or two of them.
        layers, select, scales, join, tiles: see [`BliprenConfig`].
        image_processor_options: settings of the image processor; those under `second` of the second encoder's.

    Raises:
        ValueError: for more than two encoders, or for pieces of an encoder without a fixed grid.
    """
    names = [vision] if isinstance(vision, (str, os.PathLike)) else list(vision)
    scales = scales or [1]
    check_pieces(scales, tiles)
    if len(names) > 2:
        raise ValueError(f"{len(names)} vision encoders: {', '.join(map(str, names))}; a model has one or two")
    options = dict(image_processor_options or {})
    second_options = options.pop("second", {})
    sources, image_processors = [], []
    for name, own_options in zip(names, (options, second_options)):
        name, revision = split_revision(os.fspath(name))
        config = load_vision_config(name, revision=revision, **hub_kwargs)
        image_processor = AutoImageProcessor.from_pretrained(name, revision=revision, **hub_kwargs, **own_options)
        inputs = dict(image_processor(Image.new("RGB", (320, 240)), return_tensors="pt"))
        sources.append(BliprenVisionSource(name, revision, config, measure_vision(config, inputs, layers), inputs))
        image_processors.append(image_processor)
    shape, image_processor = sources[0].shape, image_processors[0]
    num_patches, width, num_pieces = shape.num_patches(select), sum(s.shape.hidden_size for s in sources), 1
    if scales != [1] or tiles is not None or len(names) == 2:
        what = "two encoders" if len(names) == 2 else "scales and tiles"
        for source in sources:
            if source.shape.grid is None:
                raise ValueError(f"{what} need a fixed patch grid, and that of {source.name} follows the image")
        if select != "patches":
            raise ValueError(f"{what} need vision_feature_select patches: other tokens have no place in the grid")
        image_processor.scales, image_processor.tiles = scales, tiles
        image_processor.tile_patches = num_patches
        image_processor.second = json.loads(image_processors[1].to_json_string()) if len(names) == 2 else None
        if tiles is not None or join == "sequence":
            num_pieces = count_pieces(scales, tiles)
        else:
            width *= len(scales)
        num_patches = None if tiles is not None else num_pieces * num_patches
    return BliprenVisionSetup(sources, image_processor, num_pieces, num_patches, width)


__all__ = [
    "BliprenVisionSetup",
    "BliprenVisionShape",
    "BliprenVisionSource",
    "compute_patch_features",
    "load_vision_config",
    "load_vision_setup",
    "measure_vision",
    "run_vision_encoder",
    "select_patch_features",
    "used_parameters",
]
