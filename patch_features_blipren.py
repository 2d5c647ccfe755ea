"""Patch features of images and videos, which the feature cache stores."""

import torch
import torch.nn.functional as F
from torch import nn

from .pieces_blipren import join_pieces, resize_grid
from .video_blipren import write_frame_times
from .vision_blipren import run_vision_encoder, select_patch_features


class BliprenPatchFeaturesMixin:
    """`encode_images` and `encode_videos` for a model whose `base_model` has a vision tower, or two."""

    def encode_images(
        self,
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        second_pixel_values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute patch features `(num_images, num_patches, vision_hidden)`, which the feature cache stores.

        Without gradient and in eval mode, unless the vision tower is trained. A model whose time embedding is by seconds
        has one more column, the time of each patch's frame, which is 0 in images.

        Args:
            pixel_values: `(num_images, channels, height, width)`; with scales or tiles `(num_images, num_pieces, channels,
                height, width)`; for NaFlex `(num_images, max_patches, patch_width)`.
            pixel_attention_mask: `(num_images, num_patches)`, NaFlex and tiles only; also the mask of the patch features.
            spatial_shapes: `(num_images, 2)`, NaFlex and tiles only.
            second_pixel_values: as `pixel_values`, for the second encoder.

        Raises:
            ValueError: with two encoders, without the images of the second.
        """
        return self._encode(pixel_values, pixel_attention_mask, spatial_shapes, second_pixel_values)[1]

    def encode_videos(
        self,
        pixel_values_videos: torch.Tensor,
        second_pixel_values_videos: torch.Tensor | None = None,
        seconds_per_frame: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute patch features `(num_videos, num_frames * num_patches, vision_hidden)`, frame by frame.

        Args:
            pixel_values_videos: `(num_videos, num_frames, ...)`, each frame as in `encode_images`.
            second_pixel_values_videos: the same for the second encoder.
            seconds_per_frame: `(num_videos,)`, seconds from frame to frame, for a time embedding by seconds.

        Raises:
            ValueError: this model takes no videos, or needs the seconds and has none.
        """
        return self._encode_frames(pixel_values_videos, second_pixel_values_videos, seconds_per_frame)[1]

    def _encode_frames(self, pixel_values_videos, second_pixel_values_videos=None, seconds_per_frame=None, **options):
        """Return the (first) vision encoder's own output, of the frames, and the patch features of the videos."""
        if self.config.num_frames is None:
            raise ValueError("this model takes no videos: make one with `blipren new --frames 8`")
        second = second_pixel_values_videos
        outputs, features = self._encode(
            pixel_values_videos.flatten(0, 1),
            second_pixel_values=second.flatten(0, 1) if second is not None else None,
            **options,
        )
        features = features.unflatten(0, pixel_values_videos.shape[:2]).flatten(1, 2)
        if self.config.has_frame_times:
            if seconds_per_frame is None:
                raise ValueError("this model knows the times of frames in seconds: give seconds_per_frame")
            features = write_frame_times(features, pixel_values_videos.shape[1], seconds_per_frame)
        return outputs, features

    def _encode(
        self, pixel_values, pixel_attention_mask=None, spatial_shapes=None, second_pixel_values=None, **options
    ):
        """Return the (first) vision encoder's own output and the patch features of all encoders and pieces."""
        config = self.config
        there = None  # pieces that are no padding
        if config.vision_tiles is not None:
            there = pixel_attention_mask[:, :: pixel_attention_mask.shape[1] // pixel_values.shape[1]].bool()
        elif pixel_attention_mask is not None:
            options |= {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        prefix = config.num_prefix_tokens if config.vision_feature_select == "patches" else 0
        outputs, features = self._run_tower(self.base_model.vision_tower, pixel_values, prefix, there, **options)
        if config.second_vision_config is not None:
            if second_pixel_values is None:
                raise ValueError("this model has two vision encoders: give second_pixel_values beside pixel_values")
            tower, prefix = self.base_model.second_vision_tower, config.second_num_prefix_tokens
            _, second = self._run_tower(tower, second_pixel_values, prefix, there)
            second = resize_grid(second, config.second_vision_grid, config.vision_grid)
            features = torch.cat([features, second.to(features.dtype)], dim=-1)
        if there is not None:
            pieces = features.new_zeros(*there.shape, *features.shape[1:])
            pieces[there] = features
            features = pieces.flatten(1, 2)
        elif pixel_values.dim() == 5:
            pieces = features.unflatten(0, pixel_values.shape[:2])
            features = join_pieces(pieces, config.vision_grid, config.vision_scales, config.vision_join)
        return outputs, F.pad(features, (0, 1)) if config.has_frame_times else features

    def _run_tower(self, vision_tower: nn.Module, pixel_values: torch.Tensor, prefix: int, there=None, **options):
        """Return the output of a vision encoder, and the patch features `(num_images or num_pieces, num_patches, width)`."""
        frozen = not any(p.requires_grad for p in vision_tower.parameters())
        if frozen and vision_tower.training:
            vision_tower.eval()
        if pixel_values.dim() == 5:
            pixel_values = pixel_values.flatten(0, 1) if there is None else pixel_values[there]
        layers = self.config.vision_feature_layer
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            outputs = run_vision_encoder(vision_tower, pixel_values.to(vision_tower.dtype), layers, **options)
            return outputs, select_patch_features(outputs, layers, prefix)
