"""Captions by our own decoder in this process."""

from __future__ import annotations

import torch

from blipren.training.captioning.choice import CaptionColumn
from blipren.training.captioning.decoder import Answer, Decoder
from blipren.training.captioning.pictures import PictureBatch
from blipren.training.commands.caption import CaptionSettings
from blipren.training.evaluation.generation import Sampling


class LocalEngine:
    """Captions by our own decoder, from patch features that are computed once."""

    needs_features = True

    def __init__(self, model, processor, columns: list[CaptionColumn], s: CaptionSettings):
        sampling = Sampling(s.temperature, s.top_p, s.repetition_penalty)
        prompts = [column.prompt for column in columns]
        options = s.generate_options()
        self.model = model
        self.decoder = Decoder(model, processor, prompts, options, sampling, s.candidates, s.batch_size)
        # where images differ in length, rows of several batches are sorted by it
        self.variable = model.config.connector == "patches" and model.config.num_visual_tokens is None
        self.rows_per_batch = s.batch_size * (8 if self.variable else 1)
        self.batch_size = s.batch_size

    @torch.inference_mode()
    def __call__(
        self, patches: torch.Tensor, mask: torch.Tensor | None, batch: PictureBatch
    ) -> list[list[list[Answer]]]:
        features = []
        for start in range(0, len(patches), self.batch_size):
            part = slice(start, start + self.batch_size)
            inputs = {"patch_features": patches[part].to(self.model.device)}
            if mask is not None:
                inputs["patch_attention_mask"] = mask[part].to(self.model.device)
            features += self.model.get_image_features(**inputs).pooler_output
        return self.decoder(features, batch.seeds)
