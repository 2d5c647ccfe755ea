"""Blocks: one image with its answers behind a shared prefix.

The prefix is everything up to the last image token: system prompt and image. Behind it stands a segment for each answer:
its prompt and the answer.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np


@dataclass
class Block:
    """One image, its shared prefix and the segments behind it."""

    image: tuple[int, int]
    """(cache, image)"""
    prefix: list[int]
    segments: list[tuple[list[int], list[int]]] = field(default_factory=list)
    """(prompt ids behind the last image token, answer ids)"""

    def __len__(self) -> int:
        """Number of tokens that the language model reads: all but the last of each answer, which is only predicted."""
        return len(self.prefix) + sum(len(prompt) + len(answer) - 1 for prompt, answer in self.segments)


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
            block = Block(image, prefix)
            blocks.insert(0, block)  # the newest block of a prefix is found first
        block.segments.append((rest, answer))
    return blocks[::-1]
