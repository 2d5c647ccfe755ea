"""Captions that are ranked: candidates of the model and of a memory, by the CIDEr that they are predicted to have."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import LogitsProcessorList

from .consensus_blipren import NgramGuidance, NgramModel, ReferenceTable, search_joined, sum_doubts
from .image_features_blipren import IMAGE_INPUTS
from .memory_blipren import BliprenMemory
from .memory_generation_blipren import BliprenMemoryMixin, doubt_weight, load_part, masked_patches, pool_patches
from .reranker_blipren import FILES, FOLDER, BliprenReranker, find_reranker

# arguments of `generate` whose result is more than one best answer of the model itself
_OWN_DISTRIBUTION = ("streamer", "assistant_model", "prompt_lookup_num_tokens", "return_dict_in_generate")
_CACHES = ("past_key_values", "cache")  # of earlier turns, by the version of transformers
_ALONE = {"use_memory": False, "use_reranker": False}

Score = Callable[[list[tuple[int, ...]]], np.ndarray]


@dataclass
class Candidate:
    """A caption that was considered for an image.

    Attributes:
        tokens: ids without the end token. score: predicted CIDEr, less the doubts about words and the copy penalty, and the
            weighted log-likelihood. known: it is a caption of the memory, word for word.
    """

    tokens: list[int]
    score: float
    known: bool


@dataclass
class _Scoring:
    """How the candidates of a batch are scored.

    Attributes:
        scores: for each row the score of captions, `None` for a row that is no caption prompt.
        near: numbers of the memory's nearest entries for each row. guides: n-gram models of their captions.
    """

    scores: list[Score | None]
    near: list[torch.Tensor] | None = None
    guides: list[NgramModel | None] | None = None


def memory_score(memory: BliprenMemory, table: ReferenceTable, weights: np.ndarray) -> Score:
    """Return the score of captions of an image: predicted CIDEr less the doubts about words.

    Args:
        table, weights: of the memory's regression.
    """
    penalty = doubt_weight(memory)
    doubts = table.doubts(weights) if penalty else {}
    return lambda captions: table.predicted_cider(captions, weights) - penalty * sum_doubts(captions, doubts)


class BliprenRankingMixin(BliprenMemoryMixin):
    """Ranked captions for `BliprenForConditionalGeneration`, which a memory scores, or a reranker where no memory does.

    `generate` ranks captions: where every image of a row stands in front of a caption prompt, one answer is asked for, and
    it is searched, not sampled. Other prompts get the model's own answer.

    Attributes:
        reranker: the reranker, `None` without one.
    """

    reranker: BliprenReranker | None = None

    def load_reranker(self, path: str | os.PathLike | None, **hub_kwargs) -> None:
        """Use another reranker.

        Args:
            path: folder of a reranker, checkpoint folder or Hub id with one; `None` takes the reranker away.
            hub_kwargs: `revision`, `cache_dir`, `token`, `local_files_only`.

        Raises:
            ValueError: there is no reranker, or it was made for another vision encoder or language model.
        """
        if path is None:
            self.reranker = None
            return
        self.reranker = load_part(self.config, FOLDER, path, FILES[0], find_reranker, BliprenReranker, hub_kwargs)

    def save_reranker(self, checkpoint: str | os.PathLike) -> None:
        """Write the reranker into the folder `reranker` of a checkpoint."""
        self.reranker.save(Path(checkpoint) / FOLDER)

    def _ranks(self, use_memory: bool | None, use_reranker: bool | None, features, kwargs: dict) -> tuple[bool, bool]:
        """Return whether an answer of `generate` is ranked by the memory and by the reranker.

        By default it is wherever that makes sense.

        Raises:
            ValueError: one is asked for that is not there, or the answer is none that can be ranked.
        """
        wanted = self._wanted(use_memory, use_reranker)
        if any(wanted) and (reason := self._why_not_ranked(features, kwargs)) is not None:
            if use_memory or use_reranker:
                raise ValueError(f"use_{'memory' if use_memory else 'reranker'}=True, but {reason}")
            return False, False
        return wanted

    def _wanted(self, use_memory: bool | None, use_reranker: bool | None) -> tuple[bool, bool]:
        for name, use in (("memory", use_memory), ("reranker", use_reranker)):
            if use and getattr(self, name) is None:
                raise ValueError(f"use_{name}=True, but the model has no {name}: load one with load_{name}")
        memory = use_memory is not False and self.memory is not None
        if memory and use_reranker:
            raise ValueError("use_reranker=True, but the memory ranks captions: give use_memory=False, too")
        return memory, use_reranker is not False and self.reranker is not None and not memory

    def _why_not_ranked(self, features, kwargs: dict) -> str | None:
        config = kwargs.get("generation_config") or self.generation_config
        given = {name: kwargs.get(name, getattr(config, name, None)) for name in ("do_sample", "num_return_sequences")}
        reasons = {
            "there is no image": features is None,
            "it needs input_ids": kwargs.get("input_ids") is None,
            "answers are sampled": bool(given["do_sample"]),
            "several answers are asked for": (given["num_return_sequences"] or 1) != 1,
            "a key-value cache is given": any(kwargs.get(n) is not None for n in _CACHES),
            "scores, a stream or assisted generation are asked for": any(
                kwargs.get(n, getattr(config, n, None)) for n in _OWN_DISTRIBUTION
            ),
        }
        reason = next((text for text, true in reasons.items() if true), None)
        if reason is None:
            placeholders = (kwargs["input_ids"] == self.config.image_token_id).sum(dim=1).tolist()
            if placeholders != [len(image) for image in features.pooler_output]:
                reason = "rows have another number of images than one"
        if reason is None and not any(self._caption_rows(kwargs)):
            reason = "no row has a caption prompt"
        return reason

    @property
    def _caption_info(self) -> dict:
        return (self.memory or self.reranker).info

    def _caption_rows(self, kwargs: dict) -> list[bool]:
        """Return which rows are a caption prompt behind one image."""
        prompts = [tuple(prompt) for prompt in self._caption_info["prompts"]]
        return [tuple(row.tolist()) in prompts for row in self._prompts(kwargs)]

    def _prompts(self, kwargs: dict) -> list[torch.Tensor]:
        """Return the tokens of each row without placeholders and padding."""
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        kept = ids != self.config.image_token_id
        kept = kept if mask is None else kept & mask.bool()
        return [row[own] for row, own in zip(ids, kept)]

    @torch.no_grad()
    def rank_captions(
        self, use_memory: bool | None = None, use_reranker: bool | None = None, **kwargs
    ) -> list[list[Candidate]]:
        """Return the candidates of each row, best first; arguments are those of `generate`.

        Rows that are no caption prompt have one candidate, the model's own answer.

        Raises:
            ValueError: the model has neither memory nor reranker, or they are not to be used.
        """
        uses = self._wanted(use_memory, use_reranker)
        if not any(uses):
            raise ValueError("no memory and no reranker ranks captions: load one with load_memory or load_reranker")
        image_inputs = {key: kwargs.pop(key) for key in IMAGE_INPUTS if key in kwargs}
        features = self.get_image_features(**image_inputs, return_dict=True)
        kwargs["mm_encoder_outputs"] = {"image": features}
        return self._rank(*masked_patches(features, image_inputs), uses[0], kwargs)

    def _generate_ranked(
        self, patches: torch.Tensor, mask: torch.Tensor | None, use_memory: bool, kwargs: dict
    ) -> torch.LongTensor:
        """Return the best candidate of each row behind its prompt, as `generate` does."""
        ids = kwargs["input_ids"]
        ranked = self._rank(patches, mask, use_memory, kwargs)
        end, pad = self._caption_info["end"], self.generation_config.pad_token_id
        pad = kwargs.get("pad_token_id", pad if pad is not None else end)
        most = self._most_new_tokens(kwargs, ids.shape[1])
        chosen = [torch.tensor([*own[0].tokens, end][:most], device=ids.device) for own in ranked]
        answers = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=pad)
        return torch.cat([ids, answers.to(ids.dtype)], dim=1)

    def _rank(
        self, patches: torch.Tensor, mask: torch.Tensor | None, use_memory: bool, kwargs: dict
    ) -> list[list[Candidate]]:
        """Return the candidates of each row, scored by the memory, or else by the reranker."""
        memory = self.memory if use_memory else None
        settings = memory.settings if use_memory else self.reranker.settings
        ids, captioned = kwargs["input_ids"], self._caption_rows(kwargs)
        scoring = self._scoring(patches, mask, use_memory, captioned)
        answers = None if all(captioned) else self._generate_alone(kwargs)
        own = self._candidates(scoring.guides, kwargs)
        most, prompts = self._most_new_tokens(kwargs, ids.shape[1]), self._prompts(kwargs)
        result = []
        for row, score in enumerate(scoring.scores):
            if score is None:
                result.append([Candidate(self._cut(answers[row])[0], 0.0, False)])
                continue
            found = own[row]
            if use_memory:
                others = memory.tokens(scoring.near[row][: settings.retrieved].tolist())
                found += [tuple(caption) for captions in others for caption in captions if len(caption) < most]
            found, scores = search_joined(list(dict.fromkeys(found)), score, settings.joins, settings.joined, most - 1)
            if settings.fluency:
                best = np.argsort(-scores, kind="stable")[: settings.read]
                likelihoods = self._log_likelihoods([found[i] for i in best], prompts[row])
                fluency = np.full(len(found), likelihoods.min())  # of the others, which would not be chosen
                fluency[best] = likelihoods
                scores = scores + settings.fluency * fluency
            copies = np.zeros(len(found), dtype=bool)
            if use_memory:
                copies = memory.are_copies(found)
                scores = scores - settings.copy_penalty * copies
            order = np.argsort(-scores, kind="stable")
            result.append([Candidate(list(found[i]), float(scores[i]), bool(copies[i])) for i in order])
        return result

    def _scoring(
        self,
        patches: torch.Tensor,
        mask: torch.Tensor | None,
        use_memory: bool,
        captioned: list[bool],
    ) -> _Scoring:
        """Return how the candidates of each captioned row are scored, by the memory or else by the reranker."""
        scoring = _Scoring([None] * len(captioned))
        rows = [row for row, true in enumerate(captioned) if true]
        if not use_memory:
            predicted = self.reranker.predict(patches, mask)
            for row in rows:
                scoring.scores[row] = partial(self.reranker.score, predicted=predicted[row])
            return scoring
        memory, embeddings = self.memory, pool_patches(patches, mask)
        found = memory.find(embeddings, max(memory.num_regressed, memory.settings.guides))
        scoring.near = [row[row >= 0] for row in found.indices]
        queries = memory.standardise(embeddings)
        scoring.guides = [self._ngram_model(q, n) if c else None for q, n, c in zip(queries, scoring.near, captioned)]
        for row in rows:
            regression = memory.regress(queries[row], scoring.near[row][: memory.num_regressed])
            scoring.scores[row] = memory_score(memory, *regression)
        return scoring

    def _candidates(self, guides: list[NgramModel | None] | None, kwargs: dict) -> list[list[tuple[int, ...]]]:
        """Return the model's own candidates for each row: those that ended, or the first where none did.

        Args:
            guides: of each row, an n-gram model of the memory that guides its searches; `None` without a memory, whose one
                search has the reranker's number of beams.
        """
        length = kwargs["input_ids"].shape[1]
        generated: list[list[tuple[int, ...]]] = [[] for _ in kwargs["input_ids"]]
        finished: list[list[tuple[int, ...]]] = [[] for _ in kwargs["input_ids"]]
        settings = self.reranker.settings if guides is None else self.memory.settings
        for weight in (0.0,) if guides is None else settings.guidance:
            options, beams = {"num_return_sequences": 1}, settings.num_beams
            if weight or guides is None:
                options = {"num_beams": beams, "num_return_sequences": beams}
            if weight:
                guide = NgramGuidance(guides, weight, length, beams)
                options["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or []), guide])
            for row, answer in enumerate(self._generate_alone(kwargs | options)):
                row = row // options["num_return_sequences"]
                tokens, ended = self._cut(answer)
                generated[row].append(tuple(tokens))
                if ended and tokens:
                    finished[row].append(tuple(tokens))
        return [own or every[:1] for own, every in zip(finished, generated)]

    def _generate_alone(self, kwargs: dict) -> list[list[int]]:
        """Return the new tokens of each row, or beam, of the model itself."""
        # transformers repeats the features of an image for its beams in place
        outputs = {name: replace(features) for name, features in kwargs["mm_encoder_outputs"].items()}
        rows = self.generate(**{**kwargs, **_ALONE, "mm_encoder_outputs": outputs})
        return rows[:, kwargs["input_ids"].shape[1] :].tolist()

    def _log_likelihoods(self, captions: list[tuple[int, ...]], prompt: torch.Tensor) -> np.ndarray:
        """Return the log-likelihood of each caption and its end behind a prompt without an image, `(captions,)`."""
        end = self._caption_info["end"]
        rows = [[*prompt.tolist(), *caption, end] for caption in captions]
        first, width = max(1, len(prompt)), max(map(len, rows))
        ids = torch.tensor([row + [end] * (width - len(row)) for row in rows], device=self.device)
        places = [row * width + i for row, own in enumerate(rows) for i in range(first - 1, len(own) - 1)]
        if not places:  # empty captions behind an empty prompt
            return np.zeros(len(rows))
        places = torch.tensor(places)
        logits = self(input_ids=ids, logits_at=places.to(self.device), use_cache=False).logits.float()
        losses = F.cross_entropy(logits, ids.flatten()[places + 1], reduction="none").cpu()
        return np.bincount((places // width).numpy(), -losses.double().numpy(), len(rows))

    def _cut(self, answer: list[int]) -> tuple[list[int], bool]:
        """Return the tokens of an answer in front of its end, and whether it has one."""
        ends = self.generation_config.eos_token_id
        ends = {self._caption_info["end"], *(ends if isinstance(ends, list) else [ends])}
        place = next((i for i, token in enumerate(answer) if token in ends), None)
        return answer[:place], place is not None

    def _most_new_tokens(self, kwargs: dict, length: int) -> int:
        config = kwargs.get("generation_config") or self.generation_config
        most = kwargs.get("max_new_tokens", config.max_new_tokens)
        if most is None:
            most = (kwargs.get("max_length", config.max_length) or 20 + length) - length
        return most


__all__ = ["BliprenRankingMixin", "Candidate", "memory_score"]
