"""Decoding of captions in batches: one prefix of an image for all its prompts and candidates, and no row too long.

The image and what its prompts have in common is computed once. Its key-value cache is copied for each prompt and repeated
for each candidate. Rows that have ended leave the batch and its cache, so that a long caption costs its own row alone.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessorList, NoRepeatNGramLogitsProcessor

from blipren.image_features_blipren import BliprenImageFeatures
from blipren.training.errors import UserError
from blipren.training.evaluation.generation import (
    GumbelNoise,
    Sampling,
    end_ids,
    generate_ids,
    pad_id,
    pad_left,
    pad_right,
)


@dataclass
class Answer:
    """A caption, or an answer to a prompt.

    Attributes:
        num_tokens: tokens without the end token. ended: whether it ended by itself.
        mean_logprob: mean log-probability (nats) of its tokens, the end token included, by the model's own distribution.
        matching_score: probability that it belongs to the image, where a matching head scores it.
    """

    text: str
    num_tokens: int
    ended: bool
    mean_logprob: float
    matching_score: float | None = None


@dataclass
class _Row:
    """A caption that is being made."""

    ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    ended: bool = False


class Decoder:
    """Captions of images from their image features.

    Args:
        model, processor: of a full checkpoint, in evaluation mode.
        prompts: asked about every image; None is the model's own caption prompt.
        options: `max_new_tokens`, `num_beams`, `length_penalty`, `no_repeat_ngram_size`, as in `generate`.
        sampling: temperature, top-p and repetition penalty, without seeds.
        candidates: captions of an image and prompt, sampled.
        batch_size: images whose captions are made together.
    """

    def __init__(
        self,
        model,
        processor,
        prompts: Sequence[str | None],
        options: dict[str, Any],
        sampling: Sampling,
        candidates: int = 1,
        batch_size: int = 32,
    ):
        if model.config.qformer_reads_prompt:
            raise UserError(
                "the Q-Former of this model reads the prompt, so that one encoding of an image does not serve all prompts: "
                "use its processor and `generate`"
            )
        self.model, self.processor, self.prompts = model, processor, list(prompts)
        self.options, self.sampling = dict(options), sampling
        self.candidates, self.batch_size = candidates, batch_size
        self._encoded: dict[int, list[list[int]]] = {}

    def _prompt_ids(self, count: int) -> list[list[int]]:
        """Return the token ids of every prompt with `count` placeholders."""
        if count not in self._encoded:
            encode = self.processor.encode_prompt
            self._encoded[count] = [list(encode(prompt, num_visual_tokens=[count])) for prompt in self.prompts]
        return self._encoded[count]

    @torch.inference_mode()
    def __call__(self, images: Sequence[torch.Tensor], seeds: Sequence[int] = ()) -> list[list[list[Answer]]]:
        """Return the answers of each image, for each prompt, with all candidates.

        Args:
            images: image features `[num_visual_tokens, text_hidden]` of each image.
            seeds: of each image, where tokens are sampled.
        """
        results: list[list[list[Answer]]] = [[] for _ in images]
        order = sorted(range(len(images)), key=lambda i: len(images[i]))  # stable: equal lengths stay in order
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            found = self._decode([images[i] for i in rows], [seeds[i] for i in rows] if seeds else [])
            for row, answers in zip(rows, found):
                results[row] = answers
        return results

    def _decode(self, images: list[torch.Tensor], seeds: list[int]) -> list[list[list[Answer]]]:
        """Decode one batch: images -> prompts -> candidates."""
        encoded = [self._prompt_ids(len(image)) for image in images]
        if self.options.get("num_beams", 1) > 1:
            per_prompt = [self._beam_search([own[p] for own in encoded], images) for p in range(len(self.prompts))]
            return [[[answers[i]] for answers in per_prompt] for i in range(len(images))]
        tails = [len(ids) - len(os.path.commonprefix(encoded[0])) for ids in encoded[0]]
        heads = [own[0][: len(own[0]) - tails[0]] for own in encoded]
        ids, mask = (part.to(self.model.device) for part in pad_left(heads, pad_id(self.model, self.processor)))
        shared = DynamicCache(config=self.model.config.text_config)
        head_logits = self._forward(ids, mask, shared, **image_inputs(images))
        results: list[list[list[Answer]]] = [[] for _ in images]
        for p, tail in enumerate(tails):
            cache = shared if p == len(tails) - 1 else copy.deepcopy(shared)
            logits, prompt, own_mask = head_logits, ids, mask
            if tail:
                more = torch.tensor(encoded[0][p][-tail:], device=ids.device).expand(len(images), -1)
                prompt = torch.cat([ids, more], dim=1)
                own_mask = torch.cat([mask, torch.ones_like(more)], dim=1)
                logits = self._forward(more, own_mask, cache)
            if self.candidates > 1:
                cache.batch_repeat_interleave(self.candidates)
                logits, prompt, own_mask = (
                    part.repeat_interleave(self.candidates, dim=0) for part in (logits, prompt, own_mask)
                )
            row_seeds = [answer_seed(seed, p, c) for seed in seeds for c in range(self.candidates)]
            rows = self._continue(cache, logits, prompt, own_mask, row_seeds)
            for i, answers in enumerate(results):
                answers.append([self._answer(row) for row in rows[i * self.candidates : (i + 1) * self.candidates]])
        return results

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache, **inputs) -> torch.Tensor:
        """Return the logits `[rows, vocab_size]` behind the last of `ids`; the mask covers the cached positions too."""
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **inputs,
        ).logits[:, -1]

    def _processors(self, seeds: Sequence[int], prompt_length: int) -> tuple[LogitsProcessorList, list[GumbelNoise]]:
        """Return the logits processors of a batch, and those among them that hold a state of each row."""
        sampling = replace(self.sampling, seeds=seeds)
        processors = sampling.processors(range(len(seeds)), prompt_length)
        if size := self.options.get("no_repeat_ngram_size"):
            processors.insert(0, NoRepeatNGramLogitsProcessor(size))
        return processors, [one for one in processors if isinstance(one, GumbelNoise)]

    def _continue(
        self,
        cache: DynamicCache,
        logits: torch.Tensor,
        prompt: torch.Tensor,
        mask: torch.Tensor,
        seeds: list[int],
    ) -> list[_Row]:
        """Choose tokens until every row has ended. Ended rows are taken out of cache, mask and batch."""
        ends = torch.tensor(sorted(end_ids(self.model)), device=prompt.device)
        processors, noises = self._processors(seeds, prompt.shape[1])
        rows = [_Row() for _ in range(len(prompt))]
        alive, sequences = list(rows), prompt
        for step in range(self.options["max_new_tokens"]):
            logits = logits.float()
            chosen = processors(sequences, logits).argmax(dim=-1)
            logprobs = logits.log_softmax(dim=-1).gather(1, chosen[:, None])[:, 0]
            ended = torch.isin(chosen, ends)
            for row, token, logprob, end in zip(alive, chosen.tolist(), logprobs.tolist(), ended.tolist()):
                row.logprob += logprob
                row.ended = end
                if not end:
                    row.ids.append(token)
            left = (~ended).nonzero()[:, 0]
            if not len(left) or step == self.options["max_new_tokens"] - 1:
                break
            sequences = torch.cat([sequences, chosen[:, None]], dim=1)
            mask = torch.cat([mask, torch.ones_like(chosen[:, None])], dim=1)
            if len(left) < len(alive):
                cache.batch_select_indices(left)
                sequences, mask = sequences[left], mask[left]
                alive = [alive[i] for i in left.tolist()]
                for noise in noises:
                    noise.generators = [noise.generators[i] for i in left.tolist()]
            logits = self._forward(sequences[:, -1:], mask, cache)
        return rows

    def _answer(self, row: _Row) -> Answer:
        mean = row.logprob / max(1, len(row.ids) + row.ended)
        return Answer(self.processor.decode_answer(row.ids), len(row.ids), row.ended, round(mean, 5))

    def _beam_search(self, prompts: list[list[int]], images: list[torch.Tensor]) -> list[Answer]:
        """Answer by the beam search of `generate`, and score the answers in one pass."""
        options = dict(self.options)
        prompt_length = max(map(len, prompts))
        processors = replace(self.sampling, seeds=()).processors([], prompt_length)
        found = generate_ids(
            self.model, self.processor, prompts, image_inputs(images), logits_processor=processors, **options
        )
        end = self.processor.answer_end_id
        whole = [prompt + ids + [end] * ended for prompt, (ids, ended) in zip(prompts, found)]
        ids, mask = (part.to(self.model.device) for part in pad_right(whole, pad_id(self.model, self.processor)))
        spans = [(len(prompt), len(one) - len(prompt)) for prompt, one in zip(prompts, whole)]
        at = torch.cat([row * ids.shape[1] + torch.arange(p - 1, p + n - 1) for row, (p, n) in enumerate(spans)])
        at = at.to(ids.device)
        logits = self.model(input_ids=ids, attention_mask=mask, logits_at=at, **image_inputs(images)).logits.float()
        logprobs = logits.log_softmax(dim=-1).gather(1, ids.flatten()[at + 1][:, None])[:, 0]
        return [
            self._answer(_Row(ids, float(own.sum()), ended))
            for (ids, ended), own in zip(found, logprobs.split([n for _, n in spans]))
        ]


def answer_seed(seed: int, prompt: int, candidate: int) -> int:
    """Return the seed of a caption, from the seed of its image; that of the first prompt and candidate is the same."""
    if prompt == candidate == 0:
        return seed
    digest = hashlib.sha256(f"{seed} {prompt} {candidate}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def image_inputs(images: list[torch.Tensor]) -> dict[str, Any]:
    """Return image features as arguments of the model. Beam search repeats them in place, so each call has its own."""
    return {"mm_encoder_outputs": {"image": BliprenImageFeatures(pooler_output=list(images))}}
