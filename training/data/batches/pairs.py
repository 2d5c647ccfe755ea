"""Batches of image-caption pairs, for the contrast of `align`: one caption beside one image, patch features as cached."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from blipren.training.data.batches.draws import VIEW, seeded_generator
from blipren.training.data.batches.plan import BatchPlan


class CaptionPairs:
    """Every image-caption pair of a split. Answers to questions are not captions and are left out.

    Attributes:
        images: `[pairs]`, row of each pair's image. text_ids: `[pairs]`, equal for equal captions, whatever their
        case and spaces. tokens: each caption's ids. left_out: answers to questions.
    """

    def __init__(self, rows, tokenizer, max_tokens: int):
        images, self.texts, self.left_out = [], [], 0
        for image, (prompts, answers) in enumerate(zip(rows["prompts"], rows["answers"], strict=True)):
            for prompt, answer in zip(prompts, answers, strict=True):
                if prompt is None:
                    images.append(image)
                    self.texts.append(answer)
                else:
                    self.left_out += 1
        self.names = list(rows["id"])
        self.images = np.asarray(images, dtype=np.int64)
        same: dict[str, int] = {}
        text_ids = [same.setdefault(" ".join(text.lower().split()), len(same)) for text in self.texts]
        self.text_ids = np.asarray(text_ids, dtype=np.int64)
        options = {"truncation": True, "max_length": max_tokens, "split_special_tokens": True}
        self.tokens = tokenizer(self.texts, **options)["input_ids"] if self.texts else []

    def __len__(self) -> int:
        return len(self.images)

    def captions(self) -> list[list[str]]:
        """Return the captions of each image."""
        captions: list[list[str]] = [[] for _ in self.names]
        for image, text in zip(self.images, self.texts, strict=True):
            captions[image].append(text)
        return captions


class PairBatches(Dataset):
    """Item k is the k-th batch of the run: patch features, right-padded tokens, and the ids that tell true pairs.

    It depends on the pairs, the seed and k alone. Processes take turns: item `step * processes + rank`.
    """

    def __init__(self, pairs: CaptionPairs, cache, split: str, tokenizer, plan: BatchPlan, steps: int):
        self.pairs, self.cache, self.split, self.tokenizer = pairs, cache, split, tokenizer
        self.plan, self.steps = plan, steps

    def __len__(self) -> int:
        return self.steps * self.plan.micro_batches

    def __getitem__(self, item: int) -> dict:
        step, part = divmod(item, self.plan.micro_batches)
        numbers = self.plan.micro_batch(step, part)[1][:, 1]
        images = self.pairs.images[numbers]
        views = None
        if self.cache.views > 1:
            views = seeded_generator(self.plan.seed, VIEW, item).integers(self.cache.views, size=len(images))
        features, mask = self.cache.patch_features(self.split, images, views)
        tokens = self.tokenizer.pad({"input_ids": [self.pairs.tokens[n] for n in numbers]}, return_tensors="pt")
        batch = {
            "item": item,
            "ids": [self.pairs.names[image] for image in images],
            "patch_features": features,
            "patch_attention_mask": mask,
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "image_ids": torch.from_numpy(images),
            "text_ids": torch.from_numpy(self.pairs.text_ids[numbers]),
        }
        return {name: value for name, value in batch.items() if value is not None}
