"""Bag-of-words prediction: which tokens an image's answers hold, asked of its image features without a language model.

A concept-level signal in the manner of Fang et al. 2015 (arXiv 1411.4952): on few photos it teaches the bridge what is
there in a twentieth of the time that likelihood through a language model takes.
"""

import torch
from torch import nn


class BagOfWords:
    """Targets `(images, vocabulary)`: the share of an image's answers that hold a token.

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
        return torch.stack([self._row(image) for image in batch["ids"]])


def add_words_head(model: nn.Module, words: BagOfWords) -> None:
    """A norm and a linear layer on the mean image feature, beginning at each token's share among the images. It hangs on
    the model so that it is trained and resumed with it, and is taken off before the model is saved."""
    width = model.get_input_embeddings().weight.shape[1]
    linear = nn.Linear(width, words.size)
    nn.init.zeros_(linear.weight)
    with torch.no_grad():
        linear.bias.copy_(words.share.logit())
    model.words_head = nn.Sequential(nn.LayerNorm(width), linear)
