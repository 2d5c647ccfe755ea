"""CLIPScore and SigLIPScore: similarity of captions and images in the joint space of the vision encoder and its text
tower, with and without references (Hessel et al. 2021, arXiv:2104.08718).

Score of a caption: 2.5 * max(cos(image, caption), 0). The reference form is the harmonic mean of that and
max(cos(caption, nearest reference), 0). CLIP reads "A photo depicts CAPTION" as in the paper. SigLIP has no published
score: it reads the caption alone in lower case, as in its training, with the same formula. Values of different encoders
do not compare. The score is biased in favour of a model that has the same encoder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from blipren.training.evaluation.metrics.retrieval import has_text_tower

logger = logging.getLogger(__name__)

WEIGHT = 2.5
CLIP_PROMPT = "A photo depicts "


@dataclass
class TwoTowers:
    """A vision encoder with its own text tower."""

    model: torch.nn.Module
    image_processor: object
    tokenizer: object

    @classmethod
    def load(cls, encoder: str, revision: str | None = None, device: str = "cpu") -> TwoTowers:
        """Load both towers by Hub id or folder."""
        return cls(
            AutoModel.from_pretrained(encoder, revision=revision).to(device).eval(),
            AutoImageProcessor.from_pretrained(encoder, revision=revision),
            AutoTokenizer.from_pretrained(encoder, revision=revision),
        )

    @property
    def is_clip(self) -> bool:
        """CLIP's text tower takes an attention mask and a prompt; SigLIP's takes padding, as in its training."""
        return self.model.config.model_type.startswith("clip")

    @property
    def name(self) -> str:
        """Name of the metric."""
        return "CLIPScore" if self.is_clip else "SigLIPScore"

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return embeddings [images, width] of length one."""
        inputs = self.image_processor(images=list(images), return_tensors="pt").to(self.model.device)
        return _unit(self.model.get_image_features(**inputs))

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 64) -> torch.Tensor:
        """Return embeddings [texts, width] of length one."""
        written = [CLIP_PROMPT + text if self.is_clip else text.lower() for text in texts]
        length = self.model.config.text_config.max_position_embeddings
        parts = []
        for start in range(0, len(written), batch_size):
            tokens = self.tokenizer(
                written[start : start + batch_size],
                padding=True if self.is_clip else "max_length",
                truncation=True,
                max_length=length,
                return_tensors="pt",
            ).to(self.model.device)
            names = ("input_ids", "attention_mask") if self.is_clip else ("input_ids",)
            parts.append(_unit(self.model.get_text_features(**{name: tokens[name] for name in names})))
        return torch.cat(parts)


def _unit(output) -> torch.Tensor:
    values = output if isinstance(output, torch.Tensor) else output.pooler_output
    return F.normalize(values.float(), dim=-1).cpu()


def clip_scores(
    towers: TwoTowers,
    batches: Iterable[tuple[Sequence[Image.Image], Sequence[str], Sequence[Sequence[str]]]],
) -> dict[str, list[float]]:
    """Compute `CLIPScore` and `RefCLIPScore` (or SigLIP's) of each caption.

    Args:
        batches: (images, captions, references of each) in batches, so that the images of a split need not fit in memory.
    """
    plain, with_references = [], []
    for pixels, captions, references in batches:
        images, texts = towers.embed_images(pixels), towers.embed_texts(captions)
        scores = WEIGHT * (images * texts).sum(dim=-1).clamp(min=0)
        flat = towers.embed_texts([text for own in references for text in own])
        nearest = torch.stack(
            [(own @ text).max() for own, text in zip(flat.split([len(own) for own in references]), texts)]
        ).clamp(min=0)
        plain += scores.tolist()
        with_references += (2 * scores * nearest / (scores + nearest).clamp(min=1e-12)).tolist()
    return {towers.name: plain, f"Ref{towers.name}": with_references}


def load_towers(model, device: str = "cpu") -> TwoTowers | None:
    """Load both towers of the vision encoder that a model was made with.

    Returns:
        None if the encoder has no text tower or cannot be loaded. That is no error: a full checkpoint does not need the
        encoder that it was made with.
    """
    reference = (getattr(model.config, "base_models", None) or {}).get("vision")
    if reference is None:
        return None
    try:
        if not has_text_tower(reference["id"], reference["revision"]):
            return None
        return TwoTowers.load(reference["id"], reference["revision"], device)
    except (OSError, ValueError) as error:
        logger.warning("image-text similarity is left out: %s cannot be loaded: %s", reference["id"], error)
        return None
