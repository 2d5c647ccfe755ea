"""Batches of prompts, to which a model gives answers of its own; the data's answers are the references of its rewards."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from blipren.training.data.batches.blocks import Block, PromptEncoder, Segment
from blipren.training.data.batches.datasets import image_inputs
from blipren.training.data.batches.draws import DRAW, seeded_generator
from blipren.training.data.batches.plan import BatchPlan
from blipren.training.data.batches.training_data import CachedData


@dataclass(frozen=True)
class Prompt:
    """A prompt about an image of a batch."""

    place: int
    """Of the image among those of the batch."""
    image_id: str
    text: str | None
    """None is the caption prompt, whichever of the processor's was drawn."""
    prefix: list[int]
    """Token ids up to the last image token."""
    rest: list[int]
    """Token ids behind it."""
    references: list[str]


class PromptSource:
    """The prompts of one split of a cache: its captions are one prompt of an image, each question is another.

    Args:
        kinds: `captions`, `questions` or both. Images without such a prompt are left out.
    """

    def __init__(self, data: CachedData, kinds: set[str]):
        self.data, self.weight, self.texts = data, data.weight, data.texts
        rows = data.cache.split(data.split)
        self.references: list[dict[str | None, list[str]]] = []
        self.images: list[int] = []
        for image, (prompts, answers) in enumerate(zip(rows["prompts"], rows["answers"], strict=True)):
            own: dict[str | None, list[str]] = {}
            for prompt, answer in zip(prompts, answers, strict=True):
                if ("captions" if prompt is None else "questions") in kinds:
                    own.setdefault(prompt, []).append(answer)
            if own:
                self.images.append(image)
                self.references.append(own)
        self.ids = [data.ids[image] for image in self.images]

    def __len__(self) -> int:
        return len(self.ids)

    def longest_row(self, prompts: PromptEncoder) -> int:
        """Return a bound of the tokens of the longest prompt and answer of the data together."""
        return self.data.longest_row(prompts)

    def visual_tokens(self, image: int) -> int:
        return self.data.visual_tokens(self.images[image])

    def inputs(self, images: list[int], seed: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
        if self.texts.view_of is not None:  # references about places are true of the image itself
            seed = None
        return self.data.inputs([self.images[image] for image in images], seed)

    def captions(self) -> dict[str, list[str]]:
        """Return the captions of each image that has some, by its id."""
        return {name: own[None] for name, own in zip(self.ids, self.references) if None in own}

    def prompts(
        self, image: int, place: int, prompts: PromptEncoder, random: np.random.Generator | None, count: int | None
    ) -> list[Prompt]:
        """Return the prompts of an image with their token ids.

        Args:
            place: of the image in the batch.
            random: draws system prompt, caption prompt and, if `count` is given, the prompts; None draws nothing.
        """
        texts = list(self.references[image])
        if random is not None and count is not None and count < len(texts):
            texts = [texts[i] for i in sorted(random.choice(len(texts), count, replace=False))]
        system, found = prompts.draw_system(random), []
        for text in texts:
            prefix, rest = prompts.encode(prompts.draw(text, random), system, self.visual_tokens(image))
            found.append(Prompt(place, self.ids[image], text, prefix, rest, self.references[image][text]))
        return found


class PromptBatches(Dataset):
    """Micro-batches of prompts. With M micro-batches a step, item i is micro-batch i % M of step i // M.

    Args:
        data: training splits.
        prompts_per_image: prompts drawn of each image; all of them by default.
    """

    def __init__(
        self,
        data: Sequence[PromptSource],
        prompts: PromptEncoder,
        plan: BatchPlan,
        steps: int,
        prompts_per_image: int | None = None,
    ):
        self.data, self.prompts, self.plan, self.steps = data, prompts, plan, steps
        self.prompts_per_image = prompts_per_image

    def __len__(self) -> int:
        return self.steps * self.plan.micro_batches

    def __getitem__(self, item: int) -> dict:
        if not 0 <= item < len(self):
            raise IndexError(item)
        step, part = divmod(item, self.plan.micro_batches)
        epoch, images = self.plan.micro_batch(step, part)
        images = [(int(cache), int(image)) for cache, image in images]
        seed = (self.plan.seed, epoch)
        found = []
        for place, (cache, image) in enumerate(images):
            random = seeded_generator(*seed, DRAW, cache, image)
            found += self.data[cache].prompts(image, place, self.prompts, random, self.prompts_per_image)
        return {
            "item": item,
            "ids": [self.data[cache].ids[image] for cache, image in images],
            "inputs": image_inputs(self.data, images, seed),
            "prompts": found,
        }


class EvalPromptBatches(Dataset):
    """Batches of validation: every image with all its prompts, in order. Nothing is drawn."""

    def __init__(self, data: PromptSource, prompts: PromptEncoder, images_per_batch: int):
        self.data, self.prompts, self.images_per_batch = data, prompts, images_per_batch

    def __len__(self) -> int:
        return -(-len(self.data.ids) // self.images_per_batch)

    def __getitem__(self, item: int) -> dict:
        if not 0 <= item < len(self):
            raise IndexError(item)
        begin = item * self.images_per_batch
        images = list(range(begin, min(begin + self.images_per_batch, len(self.data.ids))))
        found = []
        for place, image in enumerate(images):
            found += self.data.prompts(image, place, self.prompts, None, None)
        return {
            "ids": [self.data.ids[image] for image in images],
            "inputs": self.data.inputs(images, None),
            "prompts": found,
        }


def completion_blocks(prompts: Sequence[Prompt], completions: Sequence[list[int]]) -> list[Block]:
    """Return the blocks of completions, whose segments are in the order of the completions.

    Prompts of one image with one prefix share it.

    Args:
        completions: token ids, the same number for each prompt, those of a prompt together.
    """
    samples, blocks = len(completions) // len(prompts), []
    for number, prompt in enumerate(prompts):
        if not blocks or blocks[-1].images != [(0, prompt.place)] or blocks[-1].prefix != prompt.prefix:
            blocks.append(Block([(0, prompt.place)], prompt.prefix))
        for ids in completions[number * samples : (number + 1) * samples]:
            blocks[-1].segments.append(Segment.of_answer(prompt.rest, ids))
    return blocks
