"""The frozen vision encoder: pixels to patch features, and features in the type that a cache stores."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from blipren.configuration_blipren import count_pieces
from blipren.training.data.cache.fingerprints import encoder_fingerprint
from blipren.training.engine.device import choose_device
from blipren.training.errors import UserError
from blipren.video_blipren import write_frame_times

STORAGE = {"float16": np.float16, "float32": np.float32, "int8": np.int8}
FRAME_TIMES = "seconds_per_frame"
PIXEL_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes", "second_pixel_values")


class Encoder:
    """A frozen vision encoder on one device; a call turns pixels into patch features.

    Args:
        model: a BLIPren model, of which the vision tower is used.
        image_processor: the image processor of its checkpoint.
        precision: to compute in; `auto` is the checkpoint's own, and float32 on a CPU, where half precision takes
            three times as long.
    """

    def __init__(self, model: torch.nn.Module, image_processor: Any, device: str = "auto", precision: str = "auto"):
        self.image_processor = image_processor
        self.fingerprint = encoder_fingerprint(model, image_processor)
        self.device = torch.device(choose_device(device))
        self._model = model
        tower = model.model.vision_tower
        if precision == "auto":
            dtype = torch.float32 if self.device.type == "cpu" else tower.dtype
        else:
            dtype = getattr(torch, precision)
        self.precision = str(dtype).removeprefix("torch.")
        for part in ("vision", "second_vision"):
            if part in model.parts():
                model.parts()[part].to(self.device, dtype).eval()
        self.variable = "pixel_attention_mask" in getattr(image_processor, "model_input_names", ())
        self.hidden_size = model.config.patch_feature_size
        self.has_frame_times = model.config.has_frame_times
        self.tile_patches = getattr(image_processor, "tile_patches", None)
        self.pieces = count_pieces(model.config.vision_scales, model.config.vision_tiles)

    def measure(self) -> int:
        """Return the number of patches of an image, or of a frame, measured on a blank one."""
        blank = self.image_processor(images=[Image.new("RGB", (320, 240))], return_tensors="pt")
        return self({name: blank[name] for name in PIXEL_INPUTS if name in blank})[0].shape[1]

    @torch.inference_mode()
    def __call__(
        self, pixels: dict[str, torch.Tensor], num_frames: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return features `[images, num_patches, width]` and a mask `[images, num_patches]` or None, on the device.

        Args:
            num_frames: of videos, whose frames stand behind each other: features are `[videos, num_frames * num_patches,
                width]`.
        """
        inputs = {name: pixels[name].to(self.device, non_blocking=True) for name in PIXEL_INPUTS if name in pixels}
        features = self._model.encode_images(**inputs)
        if num_frames is not None:
            features = features.unflatten(0, (-1, num_frames)).flatten(1, 2)
            if self.has_frame_times:
                features = write_frame_times(features, num_frames, pixels[FRAME_TIMES])
        return features, inputs.get("pixel_attention_mask")


def to_storage(features: torch.Tensor, dtype: str, names: list[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Convert features `[images, num_patches, width]` to the stored type; int8 has scales `[images, num_patches]`.

    Raises:
        UserError: NaN, infinity or a value beyond the range of `dtype`; the message names the first such row.
    """
    features = features.detach()
    peak = features.float().abs().amax(dim=(1, 2)).cpu()  # NaN stays NaN
    limit = 65504.0 if dtype == "float16" else torch.finfo(torch.float32).max
    good = peak <= limit
    if not bool(good.all()):
        row = int((~good).nonzero()[0])
        value = float(peak[row])
        if np.isfinite(value):
            raise UserError(
                f"row {names[row]}: a feature of {value:.4g} is beyond float16; embed with --dtype float32"
            )
        raise UserError(
            f"row {names[row]}: the encoder gives NaN or infinite features; try another encoder precision "
            "(float32), or take this image out"
        )
    if dtype == "int8":
        features = features.float()
        scale = features.abs().amax(dim=-1) / 127
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        return (features / scale[..., None]).round().to(torch.int8).cpu().numpy(), scale.cpu().numpy()
    return features.to(getattr(torch, dtype)).cpu().contiguous().numpy(), None
