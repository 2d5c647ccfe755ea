"""Features of images and videos: vision encoder, patch features, connector."""

from dataclasses import dataclass
from functools import partial

import torch
from transformers.utils import ModelOutput, can_return_tuple

from .projector_blipren import BliprenMoeProjector

# arguments that are images, or what belongs to them
IMAGE_INPUTS = (
    "pixel_values",
    "pixel_attention_mask",
    "spatial_shapes",
    "second_pixel_values",
    "patch_features",
    "patch_attention_mask",
    "qformer_input_ids",
    "qformer_attention_mask",
)
VIDEO_INPUTS = ("pixel_values_videos", "second_pixel_values_videos", "seconds_per_frame")


@dataclass
class BliprenImageFeatures(ModelOutput):
    """
    Args:
        last_hidden_state (`torch.Tensor` of shape `(num_images, num_patches, vision_hidden)`): patch features.
        pooler_output (`list[torch.Tensor]` of shape `(num_visual_tokens, text_hidden)`): image features of each image.
        router_probs (`torch.Tensor` of shape `(num_images, num_experts)`, *optional*): of the `moe` projector.
        router_aux_loss (`torch.Tensor` of shape `()`, *optional*): weighted balance loss and z-loss, in training only.
        cross_attentions (`tuple[torch.Tensor]`, *optional*): of the Q-Former, if `output_attentions`.
        hidden_states, attentions (`tuple[torch.Tensor]`, *optional*): of the vision encoder, if asked for.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: list[torch.Tensor] | None = None
    router_probs: torch.Tensor | None = None
    router_aux_loss: torch.Tensor | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class BliprenImageFeaturesMixin:
    """`get_image_features` and `get_video_features` for a model whose `base_model` has a vision tower and a connector."""

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        second_pixel_values: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        patch_attention_mask: torch.Tensor | None = None,
        qformer_input_ids: torch.LongTensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BliprenImageFeatures:
        """Compute image features from images or from cached patch features.

        Args:
            pixel_values, pixel_attention_mask, spatial_shapes, second_pixel_values: as in [`encode_images`].
            patch_features: `(num_images, num_patches, vision_hidden)`, instead of `pixel_values`.
            patch_attention_mask: `(num_images, num_patches)`, 1 for patches and 0 for padding.
            qformer_input_ids, qformer_attention_mask: `(num_images, text_length)`, the prompt of each image for a
                Q-Former that reads it (`config.qformer_reads_prompt`).
            output_attentions: return the Q-Former's cross-attention weights, and the vision encoder's attention weights
                if it runs with eager attention.
            output_hidden_states: return the vision encoder's hidden states.

        Raises:
            ValueError: with none or both of images and patch features, with patch features of another width, or with a
                prompt for a Q-Former that does not read it, or without one for a Q-Former that does.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if (pixel_values is None) == (patch_features is None):
            raise ValueError("give pixel_values or patch_features, one of them")
        encode = partial(self._encode, pixel_values, pixel_attention_mask, spatial_shapes, second_pixel_values)
        return self._encode_and_connect(
            encode,
            patch_features,
            pixel_attention_mask if patch_features is None else patch_attention_mask,
            qformer_input_ids,
            qformer_attention_mask,
            output_attentions,
            output_hidden_states,
        )

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        second_pixel_values_videos: torch.Tensor | None = None,
        seconds_per_frame: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        patch_attention_mask: torch.Tensor | None = None,
        qformer_input_ids: torch.LongTensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BliprenImageFeatures:
        """Compute the features of videos as [`get_image_features`] does those of images.

        Args:
            pixel_values_videos, second_pixel_values_videos, seconds_per_frame: see [`encode_videos`].
            patch_features: `(num_videos, num_frames * num_patches, vision_hidden)`, instead of them.
            patch_attention_mask, qformer_input_ids, qformer_attention_mask, output_attentions, output_hidden_states: as
                for images. Hidden states and attentions of the vision encoder are those of the frames.
        """
        return self._encode_and_connect(
            partial(self._encode_frames, pixel_values_videos, second_pixel_values_videos, seconds_per_frame),
            patch_features,
            patch_attention_mask,
            qformer_input_ids,
            qformer_attention_mask,
            self.config.output_attentions if output_attentions is None else output_attentions,
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        )

    def _encode_and_connect(
        self, encode, patch_features, mask, qformer_ids, qformer_mask, output_attentions, output_hidden_states
    ) -> BliprenImageFeatures:
        """Return the features of images or videos from patch features, or, without them, from what `encode` returns."""
        vision_outputs = {}
        if patch_features is None:
            options = {"output_hidden_states": True} if output_hidden_states else {}
            if output_attentions and self.base_model.vision_tower.config._attn_implementation == "eager":
                options["output_attentions"] = True
            vision_outputs, patch_features = encode(**options)
        if patch_features.dim() != 3 or patch_features.shape[-1] != self.config.patch_feature_size:
            raise ValueError(
                f"patch_features have shape {tuple(patch_features.shape)}, and the model takes (num_images, num_patches, "
                f"{self.config.patch_feature_size}): they come from another vision encoder or layer"
            )
        connected = self._connect(patch_features, mask, qformer_ids, qformer_mask, output_attentions)
        return BliprenImageFeatures(
            patch_features,
            *connected,
            vision_outputs.get("hidden_states") if output_hidden_states else None,
            vision_outputs.get("attentions") if output_attentions else None,
        )

    def _connect(self, patch_features, mask, qformer_input_ids, qformer_attention_mask, output_attentions):
        """Return the image features of each image or video, router outputs and the Q-Former's cross-attention."""
        parts, per_frame = self.base_model, self.config.patches_per_frame
        hidden_states = patch_features.to(next(parts.projector.parameters()).dtype)
        num_frames = None
        if self.config.frame_tokens and parts.qformer is not None and hidden_states.shape[1] > per_frame:
            # each frame for itself; frames that are padding attend to anything, and are left out below
            there = torch.ones(hidden_states.shape[:2], device=hidden_states.device) if mask is None else mask
            num_frames = (there.sum(dim=1) // per_frame).tolist()
            hidden_states = hidden_states.unflatten(1, (-1, per_frame)).flatten(0, 1)
            mask = None
        cross_attentions = None
        if parts.qformer is not None:
            if self.config.qformer_reads_prompt != (qformer_input_ids is not None):
                verb = "needs" if self.config.qformer_reads_prompt else "does not take"
                raise ValueError(f"this model {verb} qformer_input_ids: use the inputs that its processor returns")
            outputs = parts.qformer(
                hidden_states, mask, qformer_input_ids, qformer_attention_mask, output_attentions=output_attentions
            )
            states, cross_attentions = outputs.query_states, outputs.cross_attentions
        else:
            states = hidden_states
        router_probs = aux_loss = None
        if isinstance(parts.projector, BliprenMoeProjector):
            patches = hidden_states[..., : self.config.vision_hidden_size]  # the router reads no times
            image_features, router_probs, aux_loss = parts.projector(states, patches, mask)
        else:
            image_features = parts.projector(states)
        if num_frames is not None:
            videos = image_features.unflatten(0, (len(num_frames), -1))  # [videos, frames, queries, D]
            per_image = [video[: int(count)].flatten(0, 1) for video, count in zip(videos, num_frames)]
        elif parts.qformer is None and mask is not None:
            per_image = [features[own.bool()] for features, own in zip(image_features, mask)]
        else:
            per_image = list(image_features)
        return per_image, router_probs, aux_loss, cross_attentions


__all__ = ["BliprenImageFeatures", "BliprenImageFeaturesMixin"]
