"""Blocks: images with the answers behind them, which share them as a prefix.

The prefix is everything up to the last image token: system prompt and image. Behind it stands a segment for each answer:
its prompt and the answer. A segment may also be a conversation of several turns.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Segment:
    """Token ids behind a prefix, of which some are learned. The last one is: it is predicted and never read."""

    ids: list[int]
    learned: list[bool]
    """Of each token, whether it belongs to an answer."""
    images: tuple[tuple[int, int], ...] = ()
    """(cache, image) of the placeholders in it; those of the prefix are the block's."""
    sample: int = -1
    """Row of its conversation in the table of samples; -1 for answers about an image."""

    @classmethod
    def of_answer(cls, prompt: list[int], answer: list[int]) -> "Segment":
        """Return the segment of one prompt and its answer."""
        return cls(prompt + answer, [False] * len(prompt) + [True] * len(answer))

    def __len__(self) -> int:
        """Number of tokens that the language model reads."""
        return len(self.ids) - 1

    def last_answer(self) -> tuple[list[int], list[int]]:
        """Return the ids in front of the last answer, and the last answer."""
        start = len(self.learned) - self.learned[::-1].index(False) if False in self.learned else 0
        return self.ids[:start], self.ids[start:]


@dataclass
class Block:
    """Images, their shared prefix and the segments behind it."""

    images: list[tuple[int, int]]
    """(cache, image) in the order of their placeholders"""
    prefix: list[int]
    segments: list[Segment] = field(default_factory=list)

    def __len__(self) -> int:
        """Number of tokens that the language model reads."""
        return len(self.prefix) + sum(map(len, self.segments))


class PromptEncoder:
    """Token ids of prompts, and draws from the processor's pools of caption prompts and system prompts.

    `encode(prompt, system, num_visual_tokens)` returns the ids up to the last image token and those behind it.
    """

    def __init__(self, processor):
        self.image_token_id = processor.image_token_id
        self.caption_prompts = list(processor.prompts) or [None]
        self.system_prompts = list(processor.system_prompts or []) or [None]

        @lru_cache(maxsize=1 << 16)
        def encode(prompt: str | None, system: str | None, num_visual_tokens: int) -> tuple[list[int], list[int]]:
            ids = processor.encode_prompt(prompt=prompt, system=system, num_visual_tokens=[num_visual_tokens])
            if ids.count(self.image_token_id) != num_visual_tokens:
                raise ValueError(
                    f"prompt {prompt!r} has {ids.count(self.image_token_id)} image tokens, not {num_visual_tokens}"
                )
            end = len(ids) - ids[::-1].index(self.image_token_id)
            return ids[:end], ids[end:]

        self.encode = encode

    def draw(self, prompt: str | None, random: np.random.Generator | None) -> str | None:
        """Return the prompt, or for None a drawn caption prompt; without a generator (validation) the first one."""
        if prompt is not None:
            return prompt
        return self.caption_prompts[random.integers(len(self.caption_prompts)) if random is not None else 0]

    def draw_system(self, random: np.random.Generator | None) -> str | None:
        """Return a drawn system prompt; without a generator (validation) the first one."""
        return self.system_prompts[random.integers(len(self.system_prompts)) if random is not None else 0]


def build_blocks(
    image: tuple[int, int],
    answers: list[tuple[str | None, list[int]]],
    num_visual_tokens: int,
    prompts: PromptEncoder,
    random: np.random.Generator | None = None,
    answers_per_image: int | None = None,
    max_answer_tokens: int | None = None,
    max_block_tokens: int | None = None,
) -> list[Block]:
    """Build the blocks of an image: one, unless its answers need several prefixes or more than `max_block_tokens`.

    Args:
        image: `(cache, image)`.
        answers: `(prompt, answer ids with the end token)` pairs.
        random: draws the system prompt, the caption prompts and, if `answers_per_image` is given, the answers. Without
            it (validation) all answers are taken, with the first prompts.
        max_answer_tokens: longer answers are cut. A cut answer has no end token: a cut is not learned as an end.
    """
    if random is not None and answers_per_image is not None and answers_per_image < len(answers):
        answers = [answers[i] for i in sorted(random.choice(len(answers), answers_per_image, replace=False))]
    system = prompts.draw_system(random)
    blocks: list[Block] = []
    for prompt, answer in answers:
        prefix, rest = prompts.encode(prompts.draw(prompt, random), system, num_visual_tokens)
        answer = answer[:max_answer_tokens]
        block = next((b for b in blocks if b.prefix == prefix), None)
        is_full = block and max_block_tokens and len(block) + len(rest) + len(answer) - 1 > max_block_tokens
        if block is None or is_full:
            block = Block([image], prefix)
            blocks.insert(0, block)  # the newest block of a prefix is found first
        block.segments.append(Segment.of_answer(rest, answer))
    return blocks[::-1]
