"""Answers and conversations about numbered images, with characters as tokens."""

import json

import numpy as np
import torch

from blipren.training.data.batches.samples import CachedSamples
from blipren.training.data.batches.training_data import AnswersOfImages
from blipren.training.data.cache.samples.tokens import build_sample_tokens
from blipren.training.data.cache.tokens import build_table

IMAGE, EOS, PAD, VOCABULARY, VISUAL = 3, 2, 0, 60, 4


class ToyProcessor:
    """Characters as tokens: what PromptEncoder needs of a processor, without a tokenizer file."""

    image_token_id = IMAGE
    prompts = ["describe:", "what?", "caption:"]
    system_prompts = ["be brief", "be kind"]

    def encode_prompt(self, prompt=None, system=None, num_visual_tokens=()):
        system_ids = [] if system is None else self.encode_answer(system)[:-1]
        return [1, *system_ids, *[IMAGE] * num_visual_tokens[0], *self.encode_answer(prompt or "")[:-1]]

    def encode_conversation(self, messages, num_visual_tokens, system=None, thinking=False):
        """A token in front of each turn of the user, and answers with their end token."""
        ids, images = [1, *([] if system is None else self.encode_answer(system)[:-1])], iter(num_visual_tokens)
        for message in messages:
            ids += [5] if message["role"] == "user" else []
            for part in message["content"]:
                text = [IMAGE] * next(images) if part["type"] == "image" else self.encode_answer(part["text"])
                ids += text if part["type"] == "image" or message["role"] == "assistant" else text[:-1]
        return ids

    def encode_answer(self, answer):
        return [4 + ord(c) % 50 for c in answer] + [EOS]

    def encode_answers(self, answers):
        return [self.encode_answer(answer) for answer in answers]


class ToyData(AnswersOfImages):
    def __init__(self, texts, width=8, patches=3, name="a"):
        prompts = [[q for q, _ in row] for row in texts]
        answers = [[a for _, a in row] for row in texts]
        self.texts = build_table(prompts, answers, ToyProcessor())
        self.ids = [f"{name}{i}" for i in range(len(texts))]
        self.units = range(len(texts))
        self.features = torch.arange(len(texts)).float()[:, None, None].expand(-1, patches, width)

    def visual_tokens(self, image):
        return VISUAL

    def inputs(self, images, seed):
        return {"patch_features": self.features[images]}


class ToySamples(CachedSamples):
    """Conversations about images a0, a1, ...: turns in turn of user and assistant, `|` is an image."""

    def __init__(self, conversations, pairs=False):
        samples = []
        for turns, _, rejected in conversations:
            messages = []
            for role, text in zip(["user", "assistant"] * len(turns), turns):
                pieces = text.split("|")
                parts = [{"type": "image"}] * (len(pieces) - 1) if role == "user" else []
                parts.append({"type": "text", "text": "".join(pieces)})
                messages.append({"role": role, "content": parts})
            samples.append({"id": "s", "messages": json.dumps(messages), "rejected": rejected})
        self.tokens = build_sample_tokens(samples, ToyProcessor())
        self.images, self.pairs, self.weight = [tuple(images) for _, images, _ in conversations], pairs, 1.0
        self.image_token_id, self.per_image = IMAGE, VISUAL
        self.ids = [f"a{i}" for i in range(5)]
        groups = {}
        for sample, images in enumerate(self.images):
            groups.setdefault(images or sample, []).append(sample)
        self.units = list(groups.values())

    def inputs(self, images, seed):
        return {"patch_features": torch.tensor(images).float()[:, None, None].expand(-1, 3, 8)}


CONVERSATIONS = [
    (["|what?", "a dog", "and now?", "it runs"], [0], None),
    (["|which colour?", "red"], [0], None),
    (["||which is larger?", "the second", "sure?", "yes"], [1, 2], None),
    (["|what?", "rain", "|and here?", "snow", "|and there?", "fog"], [3, 4, 1], None),
    (["who are you?", "a model", "sure?", "yes"], [], None),
    (["hello", "good day"], [], None),
]


def toy_texts(num_images, seed=0):
    random = np.random.default_rng(seed)
    words = ["a dog runs", "two cats", "a red circle above a blue square", "rain", "people on a beach at night"]
    return [
        [
            (None if random.random() < 0.6 else "how many?", words[random.integers(5)])
            for _ in range(random.integers(1, 6))
        ]
        for _ in range(num_images)
    ]
