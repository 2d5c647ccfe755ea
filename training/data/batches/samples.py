"""Conversations of a feature cache as training data: those about the same images share them as a prefix."""

from collections.abc import Sequence

import numpy as np
import torch

from blipren.training.data.batches.blocks import Block, PromptEncoder, Segment
from blipren.training.data.batches.draws import VIEW, seeded_generator
from blipren.training.data.cache import FeatureCache
from blipren.training.data.cache.samples.table import messages_of


class CachedSamples:
    """The conversations of one split of a cache. A unit is the conversations about the same images, in the same order.

    A conversation without an image is a unit of its own.

    Args:
        pairs: take preferences alone; their blocks have the segments chosen, rejected, chosen, rejected, ..., of which
            the last answers are learned. Otherwise all conversations are taken, and all their answers learned.
        traces: see `TrainSettings`.
    """

    def __init__(
        self,
        cache: FeatureCache,
        split: str,
        model,
        processor,
        weight: float = 1.0,
        pairs: bool = False,
        traces: str = "learn",
    ):
        self.cache, self.split, self.weight, self.pairs = cache, split, weight, pairs
        self.tokens = cache.sample_tokens(split, processor, traces)
        self.ids = cache.all_ids()
        self.image_token_id = processor.image_token_id
        samples = cache.samples(split)
        self.names, self.images = list(samples["id"]), [tuple(images) for images in samples["images"]]
        taken = [s for s, worse in enumerate(samples["rejected"]) if worse is not None or not pairs]
        groups: dict[tuple, list[int]] = {}
        for sample in taken:
            groups.setdefault(self.images[sample] or (f"text {sample}",), []).append(sample)
        self.units = list(groups.values())
        qformer = model.config.connector == "qformer"
        self.per_image = model.config.num_visual_tokens if qformer else cache.num_patches
        self.num_patches = None if self.per_image is not None else cache.all_num_patches()

    def __len__(self) -> int:
        return len(self.units)

    def visual_tokens(self, image: int) -> int:
        return self.per_image if self.per_image is not None else self.num_patches[image]

    def inputs(self, images: list[int], seed: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
        views = None
        if seed is not None and self.cache.views > 1:
            views = [int(seeded_generator(*seed, VIEW, image).integers(self.cache.views)) for image in images]
        features, mask = self.cache.features_at(images, views, dtype=None)
        return {"patch_features": features} | ({} if mask is None else {"patch_attention_mask": mask})

    def expand(self, ids: list[int], images: Sequence[int]) -> list[int]:
        """Return ids with the one placeholder of each image repeated for its visual tokens."""
        return [token for token, n in zip(ids, self._repeats(ids, images)) for _ in range(n)]

    def context(self, sample: int) -> tuple[list[int], list[int]]:
        """Return the ids in front of the last answer of a conversation, and the images of their placeholders."""
        prompt, _ = Segment(*self.tokens.segments(sample)[-1]).last_answer()
        images = list(self.images[sample][: prompt.count(self.image_token_id)])
        return self.expand(prompt, images), images

    def last_question(self, sample: int) -> str:
        """Return the text of the last turn of the user."""
        (turn,) = messages_of(self.cache.samples(self.split)[sample]["messages"])[-2:-1]
        return " ".join(part["text"] for part in turn["content"] if part["type"] == "text")

    def blocks(
        self,
        unit: int,
        number: int,
        prompts: PromptEncoder,
        random: np.random.Generator | None,
        layout,
        seed: tuple[int, ...] | None = None,
    ) -> list[Block]:
        """Build the blocks of a unit.

        The prefix of a conversation is all up to the last image in front of its first answer; later images are in its
        segment. Blocks are shared where prefix and images are equal.

        Args:
            number: of this data among those that are trained on.
            random: draws the system prompt and, if `layout.answers_per_image` is given, the conversations.
        """
        samples, most = self.units[unit], layout.answers_per_image
        if random is not None and most is not None and most < len(samples):
            samples = [samples[i] for i in sorted(random.choice(len(samples), most, replace=False))]
        variant = prompts.system_prompts.index(prompts.draw_system(random))
        blocks: list[Block] = []
        for sample in samples:
            segments = [Segment(*parts) for parts in self.tokens.segments(sample, variant)]
            if self.pairs:
                prompt, chosen = segments[-1].last_answer()
                segments = [Segment.of_answer(prompt, answer) for answer in (chosen, self.tokens.rejected(sample))]
            for segment in segments:
                self._add_segment(blocks, segment, sample, number, layout)
        return blocks

    def _add_segment(self, blocks: list[Block], segment: Segment, sample: int, number: int, layout) -> None:
        """Add a segment with one placeholder an image to the block of its prefix, which may be a new one."""
        ids, learned, images = segment.ids, segment.learned, self.images[sample]
        if layout.max_answer_tokens is not None:
            ids, learned = cut_answers(ids, learned, layout.max_answer_tokens)
        first = learned.index(True)
        shared = max((i + 1 for i in range(first) if ids[i] == self.image_token_id), default=0)
        count = ids[:shared].count(self.image_token_id)
        behind = images[count : ids.count(self.image_token_id)]
        prefix = self.expand(ids[:shared], images)
        rest = ids[shared:]
        flags = [flag for flag, n in zip(learned[shared:], self._repeats(rest, behind)) for _ in range(n)]
        segment = Segment(self.expand(rest, behind), flags, tuple((number, image) for image in behind), sample)
        own = [(number, image) for image in images[:count]]
        block = next((b for b in reversed(blocks) if b.prefix == prefix and b.images == own), None)
        if block is None or (layout.row_tokens and len(block) + len(segment) > layout.row_tokens):
            block = Block(own, prefix)
            blocks.append(block)
        block.segments.append(segment)

    def _repeats(self, ids: list[int], images: Sequence[int]) -> list[int]:
        counts = iter(images)
        return [self.visual_tokens(next(counts)) if token == self.image_token_id else 1 for token in ids]

    def answer_ids(self, unit: int) -> list[list[int]]:
        found = []
        for sample in self.units[unit]:
            for ids, learned in self.tokens.segments(sample):
                edges = np.flatnonzero(np.diff([0, *learned, 0]))
                found += [ids[begin:end] for begin, end in zip(edges[::2], edges[1::2])]
        return found

    def longest_row(self, prompts: PromptEncoder) -> int:
        """Return a bound of the tokens of the longest conversation."""
        images = max((len(images) for images in self.images), default=0)
        visual = max((self.visual_tokens(image) for own in self.images for image in own), default=0)
        return int(np.diff(self.tokens.starts).max()) + images * visual


def cut_answers(ids: list[int], learned: list[bool], most: int) -> tuple[list[int], list[bool]]:
    """Return ids and flags with at most `most` learned tokens of each answer; the rest of the last one is left out."""
    flags, run = [], 0
    for flag in learned:
        run = run + 1 if flag else 0
        flags.append(flag and run <= most)
    end = len(flags) - flags[::-1].index(True)
    return ids[:end], flags[:end]
