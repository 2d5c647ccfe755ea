"""A memory for a tiny model."""

import torch

from blipren.consensus_blipren import letters_of_tokens
from blipren.memory_blipren import BliprenMemory
from blipren.training.data.cache.tokens import encode_answers
from blipren.training.memory.build import decode_tokens, memory_info

CAPTIONS = ["a red ball on the green grass", "two dogs run on a beach", "a picture of the grass", "a dog on a ball"]


def random_memory(model, processor, seed: int) -> BliprenMemory:
    """Return a memory of twelve images that fits a model."""
    generator = torch.Generator().manual_seed(seed)
    captions = [[CAPTIONS[(i + seed) % 4], CAPTIONS[(i * i + 1) % 4]] for i in range(12)]
    tokens = [[ids[:-1] for ids in encode_answers(processor, own)] for own in captions]
    texts = {"id": [str(i) for i in range(12)], "image_hash": [""] * 12, "captions": captions, "tokens": tokens}
    embeddings = torch.randn(12, model.config.vision_hidden_size, generator=generator)
    letters = letters_of_tokens(decode_tokens(processor, model.config.text_config.vocab_size))
    return BliprenMemory.build(embeddings, texts, memory_info(model, processor), letters)
