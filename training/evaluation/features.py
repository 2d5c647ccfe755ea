"""Patch features of images, made once for everything that is asked about the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from blipren.configuration_blipren import count_pieces
from blipren.video_blipren import VideoFrames, seconds_per_frame, write_frame_times


@dataclass
class PatchFeatures:
    """Patch features of images, on the CPU.

    Attributes:
        patches: [images, patches, vision_hidden]. mask: [images, patches], or None if all patches are valid.
        pixels: output of the image processor, for pictures of what the encoder saw, of videos [videos, frames, ...]; None
            unless it was asked for.
    """

    patches: torch.Tensor
    mask: torch.Tensor | None = None
    pixels: dict[str, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, rows) -> PatchFeatures:
        pixels = None if self.pixels is None else {name: value[rows] for name, value in self.pixels.items()}
        return PatchFeatures(self.patches[rows], None if self.mask is None else self.mask[rows], pixels)

    def visual_tokens(self, config) -> list[int]:
        """Return the number of visual tokens of each image after the connector."""
        counts = [self.patches.shape[1]] * len(self) if self.mask is None else self.mask.sum(dim=1).tolist()
        return [config.count_visual_tokens(count) for count in counts]

    def model_inputs(self, device) -> dict[str, torch.Tensor]:
        """Return the keyword arguments of the model that give it these images."""
        inputs = {"patch_features": self.patches.to(device)}
        if self.mask is not None:
            inputs["patch_attention_mask"] = self.mask.to(device)
        return inputs


@torch.no_grad()
def encode_images(
    model,
    processor,
    images: Sequence[Image.Image] | Sequence[VideoFrames],
    batch_size: int = 32,
    keep_pixels: bool = False,
) -> PatchFeatures:
    """Run images, or the sampled frames of videos, through the image processor and the frozen vision encoder.

    Args:
        keep_pixels: keep the image processor's output too.
    """
    parts, pixels = [], []
    batch_size = max(1, batch_size // count_pieces(model.config.vision_scales, model.config.vision_tiles))
    if images and isinstance(images[0], list):
        num_frames = len(images[0])
        frames = [frame for video in images for frame in video]
        features = encode_images(model, processor, frames, batch_size, keep_pixels)
        kept = {name: value.unflatten(0, (-1, num_frames)) for name, value in (features.pixels or {}).items()}
        patches = features.patches.unflatten(0, (-1, num_frames)).flatten(1, 2)
        if model.config.has_frame_times:
            patches = write_frame_times(
                patches, num_frames, torch.tensor([seconds_per_frame(video) for video in images])
            )
        return PatchFeatures(patches, None, kept if keep_pixels else None)
    for start in range(0, len(images), batch_size):
        inputs = processor.image_processor(images=list(images[start : start + batch_size]), return_tensors="pt")
        parts.append(model.encode_images(**{name: value.to(model.device) for name, value in inputs.items()}).cpu())
        pixels.append(inputs)
    joined = {name: torch.cat([p[name] for p in pixels]) for name in pixels[0]}
    return PatchFeatures(torch.cat(parts), joined.get("pixel_attention_mask"), joined if keep_pixels else None)
