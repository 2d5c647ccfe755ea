"""Caption filtering by image-text similarity, where the vision encoder has a text tower of its own (SigLIP, CLIP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from blipren.training.data.cache.encoder import PIXEL_INPUTS
from blipren.training.errors import UserError


class SimilarityScorer:
    """Cosines between images and captions in the dual encoder that the vision encoder is a part of.

    Args:
        base: `config.base_models["vision"]` of the model, with `id` and `revision`.
        device: where it runs.

    Raises:
        UserError: the encoder's checkpoint has no text tower.
    """

    def __init__(self, base: dict[str, Any], device: torch.device):
        name, revision = base.get("id"), base.get("revision")
        if not name:
            raise UserError("the model does not say where its vision encoder came from, so there is no text tower")
        config = AutoConfig.from_pretrained(name, revision=revision)
        if not (hasattr(config, "text_config") and hasattr(config, "vision_config")):
            raise UserError(
                f"vision encoder {name} ({config.model_type}) has no text tower: min_similarity and keep_best work "
                "with full SigLIP and CLIP checkpoints"
            )
        self.model = AutoModel.from_pretrained(name, revision=revision, dtype=torch.float32).to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        self.max_length = config.text_config.max_position_embeddings
        self.device = device

    @torch.inference_mode()
    def __call__(self, pixels: dict[str, torch.Tensor], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """Return the cosines of each image with each of its own texts.

        Args:
            pixels: the image processor's output.
            texts: the texts of each image.
        """
        flat = [text for row in texts for text in row]
        if not flat:
            return [[] for _ in texts]
        inputs = {name: pixels[name].to(self.device) for name in PIXEL_INPUTS if name in pixels}
        inputs["pixel_values"] = inputs["pixel_values"].float()
        images = _unit(self.model.get_image_features(**inputs))
        tokens = self.tokenizer(
            flat, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )  # SigLIP was trained on full-length padding
        allowed = {key: tokens[key].to(self.device) for key in ("input_ids", "attention_mask") if key in tokens}
        captions = _unit(self.model.get_text_features(**allowed))
        owner = torch.tensor([number for number, row in enumerate(texts) for _ in row], device=images.device)
        cosines = iter((images[owner] * captions).sum(dim=-1).tolist())
        return [[next(cosines) for _ in row] for row in texts]


def _unit(output: Any) -> torch.Tensor:
    features = output if isinstance(output, torch.Tensor) else output.pooler_output
    return torch.nn.functional.normalize(features.float(), dim=-1)


def refuse_by_similarity(
    scores: Sequence[float | None], min_similarity: float | None, keep_best: int | None
) -> dict[int, tuple[str, str]]:
    """Return the texts to refuse, `{place: (rule, value)}`. A text without a score (an answer to a question) is kept."""
    refused: dict[int, tuple[str, str]] = {}
    ranked = sorted((place for place, score in enumerate(scores) if score is not None), key=lambda p: -scores[p])
    for rank, place in enumerate(ranked):
        if min_similarity is not None and scores[place] < min_similarity:
            refused[place] = ("min_similarity", f"{scores[place]:.3f}")
        elif keep_best is not None and rank >= keep_best:
            refused[place] = ("keep_best", f"{scores[place]:.3f}, rank {rank + 1}")
    return refused
