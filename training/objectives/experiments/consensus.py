"""Consensus captions: for each training image, the captions that the other images predict to fit it best.

The captions of a small data set hold more than features can predict: a model memorizes what five people wrote of a
photo, and its captions of new photos get no better. So an image learns captions of similar images instead, and parts of
them that are joined. Kernel ridge regression on the mean patch feature predicts the CIDEr of each for an image that is left
out, as a memory does (`memory_blipren.py`). An image learns those with the highest predicted score. This distils
nearest-neighbour captioning (Devlin et al. 2015, arXiv 1505.04467) into the bridge.
"""

from functools import partial

import numpy as np
import torch

from blipren.consensus_blipren import DocumentFrequencies, ReferenceTable, search_joined
from blipren.memory_blipren import MemorySettings
from blipren.training.console import print_line
from blipren.training.data.cache.tokens import build_table
from blipren.training.errors import UserError
from blipren.training.memory.build import read_cache
from blipren.training.objectives.experiments.experiment import Experiment
from blipren.training.objectives.experiments.settings import ConsensusSettings

MOST_IMAGES = 5_000  # a matrix of images x images is inverted, and each image is compared with the captions of all


def left_out_weights(embeddings: torch.Tensor, settings: MemorySettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `[images, images]`, by which the scores of the other images predict that of each, and squared distances.

    Kernel ridge regression with a Gaussian kernel, leave-one-out in closed form, of what lies above the mean score. A row
    adds up to one, and an image has no weight in its own.
    """
    standard = ((embeddings - embeddings.mean(dim=0)) / embeddings.std(dim=0).clamp_min(1e-6)).double()
    squares = torch.cdist(standard, standard) ** 2
    kernel = torch.exp(-squares / (squares.median().clamp_min(1e-6) * settings.kernel_width))
    inverse = torch.linalg.inv(kernel + settings.ridge * torch.eye(len(kernel), dtype=torch.double))
    weights = -inverse / inverse.diagonal()[:, None]
    weights.fill_diagonal_(0.0)
    weights += (1 - weights.sum(dim=1, keepdim=True)) / max(len(weights) - 1, 1)
    return weights.fill_diagonal_(0.0), squares


def consensus_captions(source, count: int, processor) -> dict[int, list[str]]:
    """Return `count` different captions for each image of a `CachedData` with captions, best first.

    Raises:
        UserError: there are too many images to compare all with all, or fewer than two.
    """
    images, settings = list(source.references()), MemorySettings()
    if not 2 <= len(images) <= MOST_IMAGES:
        raise UserError(
            f"consensus compares all images of a cache with each other, 2 to {MOST_IMAGES:,}; "
            f"{source.cache.folder} has {len(images):,} with captions: leave this experiment out"
        )
    embeddings, texts, _ = read_cache(source.cache, source.split, processor)
    weights, squares = left_out_weights(embeddings, settings)
    tokens = [[tuple(caption) for caption in own] for own in texts["tokens"]]
    longest = max(len(caption) for own in tokens for caption in own)
    table, chosen = ReferenceTable(tokens, DocumentFrequencies.count(tokens)), {}
    for row, image in enumerate(images):
        near = [i for i in squares[row].argsort()[: settings.retrieved + 1].tolist() if i != row]
        known = list(dict.fromkeys(caption for i in near for caption in tokens[i]))
        score = partial(table.predicted_cider, image_weights=weights[row].numpy())
        found, scores = search_joined(known, score, settings.joins, settings.joined, longest)
        best = np.argsort(-scores, kind="stable")
        different = dict.fromkeys(processor.decode_answer(list(found[i])) for i in best[: 2 * count + 8])
        chosen[image] = list(different)[:count]
    return chosen


def replace_captions_by_consensus(source, count: int, processor) -> str:
    """Replace the captions of a source's images by consensus captions; its questions keep their answers.

    Returns:
        A line for the log.
    """
    chosen, rows = consensus_captions(source, count, processor), source.cache.split(source.split)
    prompts, answers = [], []
    for image, (own_prompts, own_answers) in enumerate(zip(rows["prompts"], rows["answers"], strict=True)):
        asked = [(p, a) for p, a in zip(own_prompts, own_answers, strict=True) if p is not None]
        pairs = [(None, text) for text in chosen.get(image, [])] + asked
        prompts.append([prompt for prompt, _ in pairs])
        answers.append([answer for _, answer in pairs])
    source.texts = build_table(prompts, answers, processor)
    different = len({text for texts in chosen.values() for text in texts})
    return f"consensus: {len(chosen):,} images learn {count} captions each that others predict, {different:,} different ones"


class Consensus(Experiment):
    """Consensus captions in every training source. It adds no loss."""

    def __init__(self, settings: ConsensusSettings):
        self.captions = settings.captions

    def prepare(self, model, processor, sources: list) -> None:
        for source in sources:
            print_line(replace_captions_by_consensus(source, self.captions, processor))
