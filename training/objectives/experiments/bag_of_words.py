"""Bag-of-words prediction: which tokens an image's answers hold, from its image features without a language model.

A concept-level signal in the manner of Fang et al. 2015 (arXiv 1411.4952): on few photos it teaches the bridge what is
there in a twentieth of the time that likelihood through a language model takes.
"""

import torch
from torch import nn
from torch.nn import functional as F

from blipren.training.objectives.experiments.experiment import Experiment
from blipren.training.objectives.experiments.settings import BagOfWordsSettings


class WordTargets:
    """Targets `[images, vocabulary]`: the share of an image's answers that hold a token.

    Args:
        sources: training sources, whose token tables hold the answers.
        processor: its tokenizer's vocabulary is the vocabulary.
    """

    def __init__(self, sources, processor):
        self.size = len(processor.tokenizer)
        self.answers = {s.ids[i]: [ids for _, ids in s.texts.answers(i)] for s in sources for i in range(len(s.texts))}
        total = torch.zeros(self.size)
        for image in self.answers:
            total += self._row(image)
        self.share = (total / len(self.answers)).clamp(1e-4, 1 - 1e-4)

    def _row(self, image: str) -> torch.Tensor:
        row, answers = torch.zeros(self.size), self.answers[image]
        for ids in answers:
            row[list(set(ids))] += 1 / len(answers)
        return row

    def targets(self, batch: dict) -> torch.Tensor:
        """Return the targets of a batch's images."""
        return torch.stack([self._row(image) for image in batch["ids"]])


def add_words_head(model: nn.Module, words: WordTargets) -> None:
    """Add a norm and a linear layer on the mean image feature, which start at each token's share among the images.

    They are a module of the model so that checkpoints hold them. The finished model is saved without them.
    """
    width = model.get_input_embeddings().weight.shape[1]
    linear = nn.Linear(width, words.size)
    nn.init.zeros_(linear.weight)
    with torch.no_grad():
        linear.bias.copy_(words.share.logit())
    model.words_head = nn.Sequential(nn.LayerNorm(width), linear)


class BagOfWords(Experiment):
    """Binary cross-entropy of the tokens of each image's answers."""

    def __init__(self, settings: BagOfWordsSettings):
        self.weight = settings.weight
        self.losses: list[torch.Tensor] = []
        self.images = 0

    def prepare(self, model, processor, sources: list) -> None:
        self.words = WordTargets(sources, processor)
        add_words_head(model, self.words)

    def loss(self, trainer, model, batch: dict) -> torch.Tensor:
        """Return the loss summed over vocabulary and images."""
        inputs, _ = trainer.regularized(batch)
        features = trainer.model.get_image_features(**inputs).pooler_output
        pooled = torch.stack([tokens.mean(dim=0) for tokens in features])  # [images, width]
        wanted = self.words.targets(batch).to(pooled.device)
        loss = F.binary_cross_entropy_with_logits(trainer.model.words_head(pooled), wanted, reduction="sum")
        self.losses.append(loss.detach())
        self.images += len(batch["ids"])
        return loss

    def log_values(self) -> dict[str, float]:
        """Return `words_loss`, the loss an image."""
        found = {"words_loss": torch.stack(self.losses).sum().item() / self.images} if self.losses else {}
        self.losses, self.images = [], 0
        return found
