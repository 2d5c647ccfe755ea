"""Matching scores: the probability that a caption belongs to its image, by the matching head of stage 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from blipren import BliprenForImageTextRetrieval
from blipren.training.data.cache.fingerprints import as_stored, encoder_fingerprint, first_difference
from blipren.training.engine.device import choose_device
from blipren.training.engine.loading import load_checkpoint, load_config
from blipren.training.errors import UserError
from blipren.training.evaluation.metrics.retrieval import tokenize


def has_matching_head(path: str) -> bool:
    """Return whether a checkpoint holds a trained matching head. Training behind stage 1 keeps none."""
    config = load_config(path)
    if "BliprenForImageTextRetrieval" not in (config.architectures or []):
        return False
    return config.trained_heads is None or "matching" in config.trained_heads


class Matcher:
    """The matching head of a checkpoint of `blipren align`.

    Args:
        path: folder or Hub id. captioner, processor: of the model that captions; both must have the same encoder, so that
            an image is encoded once.

    Raises:
        UserError: no matching head was trained, or the vision encoder is another one.
    """

    def __init__(self, path: str, captioner, processor, device: str, batch_size: int = 64):
        if not has_matching_head(path):
            raise UserError(
                f"{path} has no trained matching head: name a checkpoint of `blipren align` (with --itm-weight above 0) by "
                "--matching-model"
            )
        model, own = load_checkpoint(path, BliprenForImageTextRetrieval)
        if own.qformer_tokenizer is None:
            raise UserError(f"{path} has no tokenizer of its Q-Former (qformer_tokenizer/)")
        parts = (
            encoder_fingerprint(captioner, processor.image_processor),
            encoder_fingerprint(model, own.image_processor),
        )
        if found := first_difference(*map(as_stored, parts)):
            field, ours, theirs = found
            raise UserError(
                f"{path} scores features of another vision encoder: {field} is {theirs!r}, and {ours!r} in the model that "
                "captions; align a checkpoint with the same encoder"
            )
        self.model = model.to(choose_device(device)).eval()
        self.tokenizer, self.batch_size = own.qformer_tokenizer, batch_size
        self.max_length = min(64, model.config.qformer_config.max_position_embeddings)

    @torch.inference_mode()
    def __call__(
        self, patches: torch.Tensor, mask: torch.Tensor | None, images: Sequence[int], texts: Sequence[str]
    ) -> list[float]:
        """Return the probability that each text belongs to its image.

        Args:
            patches: `[images, patches, vision_hidden]`. mask: `[images, patches]` or None. images: place of the image of
                each text.
        """
        scores = [0.0] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        device = self.model.device
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            rows = torch.tensor([images[i] for i in chosen], device=patches.device)
            tokens = tokenize(self.tokenizer, [texts[i] for i in chosen], self.max_length).to(device)
            logits = self.model(
                patch_features=patches[rows].to(device),
                patch_attention_mask=None if mask is None else mask[rows].to(device),
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                objective="itm",
            ).logits
            for i, score in zip(chosen, logits.float().softmax(dim=-1)[:, 1].tolist()):
                scores[i] = round(score, 5)
        return scores
