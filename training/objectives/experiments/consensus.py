"""Consensus captions: for each training image, the captions of other images that its features say will fit it best.

The captions of a small data set hold more than features can predict: a model memorizes what five people wrote of a
photo, and its captions of new photos get no better. So an image learns captions of similar images instead. The CIDEr of
every caption of the set against the captions of every image is known. Kernel ridge regression on the mean patch feature
predicts it for an image that is left out. An image learns the captions with the highest predicted score. This distils
nearest-neighbour captioning (Devlin et al. 2015, arXiv 1505.04467) into the bridge.
"""

import torch

from blipren.training.console import print_line
from blipren.training.data.cache.tokens import build_table
from blipren.training.errors import UserError
from blipren.training.objectives.experiments.experiment import Experiment
from blipren.training.objectives.experiments.settings import ConsensusSettings
from blipren.training.objectives.rewards.cider import NGRAMS, SIGMA, CiderReward

MOST_IMAGES = 5_000  # with five captions each, a matrix of captions x images is half a gigabyte; there are a few
RIDGE = 0.3  # .1 to 1 are alike on flickr8k-mini
BLOCK = 1000  # captions that are compared with all at a time


def caption_scores(references: list[list[str]]) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Return the captions of all images, `[captions]` the image of each, `[captions, images]` CIDEr against each image.

    The vectors are those of `CiderReward`, compared all at once as products of sparse matrices. CIDEr-D's clipping of
    repeated n-grams is left out: such a product cannot do it, and human captions hardly repeat any.
    """
    captions = [text for texts in references for text in texts]
    image_of = torch.tensor([image for image, texts in enumerate(references) for _ in texts])
    reward = CiderReward(dict(enumerate(references)))
    weighed = [vectors for image in range(len(references)) for vectors in reward.references[image]]
    bigrams = torch.tensor([length for _, _, length in weighed], dtype=torch.float32)
    scores = torch.zeros(len(captions), len(references))
    for n in range(NGRAMS):
        column = {ngram: i for i, ngram in enumerate({g: None for vectors, _, _ in weighed for g in vectors[n]})}
        places = [(row, column[ngram]) for row, (vectors, _, _) in enumerate(weighed) for ngram in vectors[n]]
        weights = [w / (norms[n] or 1.0) for vectors, norms, _ in weighed for w in vectors[n].values()]
        table = torch.sparse_coo_tensor(
            torch.tensor(places).reshape(-1, 2).T,
            torch.tensor(weights, dtype=torch.float32),
            (len(captions), len(column)),
            check_invariants=False,
        ).coalesce()
        for begin in range(0, len(captions), BLOCK):
            block = torch.arange(begin, min(begin + BLOCK, len(captions)))
            alike = torch.sparse.mm(table, table.index_select(0, block).to_dense().T)  # [captions, block]
            alike *= torch.exp(-((bigrams[:, None] - bigrams[None, block]) ** 2) / (2 * SIGMA**2))
            scores[block] += torch.zeros(len(references), len(block)).index_add_(0, image_of, alike).T
    return captions, image_of, scores * 10 / NGRAMS / torch.bincount(image_of)


def predicted_scores(scores: torch.Tensor, image_of: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Return `[captions, images]`, the score of each caption that the other images predict for an image; -1 for its own.

    Kernel ridge regression on the `[images, width]` features, with a Gaussian kernel as wide as the median distance,
    leave-one-out in closed form.
    """
    images = len(features)
    own = image_of[:, None] == torch.arange(images)
    # a caption always fits its own image, which predicts nothing for others: there it counts as the mean of the others
    mean = (scores.masked_fill(own, 0).sum(dim=1) / max(images - 1, 1))[:, None]
    above = torch.where(own, 0.0, scores - mean)
    standard = ((features - features.mean(dim=0)) / features.std(dim=0).clamp_min(1e-6)).double()
    squares = torch.cdist(standard, standard) ** 2
    kernel = torch.exp(-squares / squares.median().clamp_min(1e-12))
    inverse = torch.linalg.inv(kernel + RIDGE * torch.eye(images, dtype=torch.double)).float()
    return (above - above @ inverse / inverse.diagonal() + mean).masked_fill(own, -1.0)


def consensus_captions(source, count: int) -> dict[int, list[str]]:
    """Return `count` different captions of other images for each image of a `CachedData` with captions, best first.

    Raises:
        UserError: there are too many images to compare all with all, or fewer than two.
    """
    references = source.references()
    if not 2 <= len(references) <= MOST_IMAGES:
        raise UserError(
            f"consensus compares all images of a cache with each other, 2 to {MOST_IMAGES:,}; "
            f"{source.cache.folder} has {len(references):,} with captions: leave this experiment out"
        )
    images, means = list(references), []
    for begin in range(0, len(images), BLOCK):
        inputs = source.inputs(images[begin : begin + BLOCK], None)
        features = inputs["patch_features"].float()
        mask = inputs.get("patch_attention_mask", torch.ones(features.shape[:2]))[..., None]
        means.append((features * mask).sum(dim=1) / mask.sum(dim=1))
    captions, image_of, scores = caption_scores([references[image] for image in images])
    order = predicted_scores(scores, image_of, torch.cat(means)).argsort(dim=0, descending=True, stable=True).T
    chosen = {}
    for image, ranked in zip(images, order, strict=True):
        best: dict[str, None] = {}  # a set in order: other images may have equal captions
        for caption in ranked[: len(captions) - len(references[image])].tolist():  # its own are last
            best[captions[caption]] = None
            if len(best) == count:
                break
        chosen[image] = list(best)
    return chosen


def replace_captions_by_consensus(source, count: int, processor) -> str:
    """Replace the captions of a source's images by consensus captions; its questions keep their answers.

    Returns:
        A line for the log.
    """
    chosen, rows = consensus_captions(source, count), source.cache.split(source.split)
    prompts, answers = [], []
    for image, (own_prompts, own_answers) in enumerate(zip(rows["prompts"], rows["answers"], strict=True)):
        asked = [(p, a) for p, a in zip(own_prompts, own_answers, strict=True) if p is not None]
        pairs = [(None, text) for text in chosen.get(image, [])] + asked
        prompts.append([prompt for prompt, _ in pairs])
        answers.append([answer for _, answer in pairs])
    source.texts = build_table(prompts, answers, processor)
    different = len({text for texts in chosen.values() for text in texts})
    return (
        f"consensus: {len(chosen):,} images learn {count} captions of other images each, {different:,} different ones"
    )


class Consensus(Experiment):
    """Consensus captions in every training source. It adds no loss."""

    def __init__(self, settings: ConsensusSettings):
        self.captions = settings.captions

    def prepare(self, model, processor, sources: list) -> None:
        for source in sources:
            print_line(replace_captions_by_consensus(source, self.captions, processor))
