"""A reranker for a tiny model."""

import torch

from blipren.reranker_blipren import BliprenReranker, RerankerNetwork, RerankerSettings
from blipren.training.data.cache.tokens import encode_answers
from blipren.training.memory.build import memory_info
from blipren.training.reranker.tables import build_tables
from tests.memory.tools import CAPTIONS


def random_reranker(model, processor, seed: int) -> BliprenReranker:
    """Return a reranker that fits a model, with tables of twelve images and a network of random weights."""
    captions = [[CAPTIONS[(i + seed) % 4], CAPTIONS[(i * i + 1) % 4]] for i in range(12)]
    tables = build_tables([[ids[:-1] for ids in encode_answers(processor, own)] for own in captions], width=4)
    shape = {"queries": 2, "hidden": 8, "heads": 2}
    torch.manual_seed(seed)
    network = RerankerNetwork(model.config.patch_feature_size, tables["directions"].shape[1], **shape)
    info = {**memory_info(model, processor), "images": 12, "shape": network.shape}
    return BliprenReranker(network, tables, info, RerankerSettings())
