"""Captions with a memory: candidates of the model and of known images, ranked by what neighbours' captions predict."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import LogitsProcessorList

from .consensus_blipren import NgramGuidance, NgramModel
from .image_features_blipren import IMAGE_INPUTS, BliprenImageFeatures
from .memory_blipren import FILES, FOLDER, INDEX, BliprenMemory, find_memory

HALF_DOUBTED = 180  # entries with which doubts about words have half the weight of a large memory

# arguments of `generate` whose result is more than one best answer of the model itself
_OWN_DISTRIBUTION = ("streamer", "assistant_model", "prompt_lookup_num_tokens", "return_dict_in_generate")
_CACHES = ("past_key_values", "cache")  # of earlier turns, by the version of transformers


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


def memory_encoder(config) -> dict:
    """Return what decides the embeddings of a memory: hashes of the vision encoders, layers and scales."""
    bases = config.base_models or {}
    return {
        "vision": (bases.get("vision") or {}).get("sampled_sha256"),
        "second_vision": (bases.get("second_vision") or {}).get("sampled_sha256"),
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select": config.vision_feature_select,
        "vision_scales": config.vision_scales,
        "vision_join": config.vision_join,
        "vision_tiles": config.vision_tiles,
        "width": config.patch_feature_size,
    }


def memory_language_model(config) -> dict:
    """Return what decides the token ids of a memory."""
    base = (config.base_models or {}).get("llm") or {}
    return {"weights": base.get("sampled_sha256"), "vocab_size": config.text_config.vocab_size}


def doubt_weight(memory: BliprenMemory) -> float:
    """Return the weight of doubts about words, which is less in a small memory.

    Most words are of few images there and look absent from a new one: doubts differ more between candidates, and predicted
    scores do not.
    """
    return memory.settings.invention_penalty * len(memory) / (len(memory) + HALF_DOUBTED)


def pool_patches(patch_features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the embedding of each image, `(images, width)` in float32: the mean of its patch features."""
    patch_features = patch_features.float()
    if mask is None:
        return patch_features.mean(dim=1)
    mask = mask.to(patch_features)[..., None]
    return (patch_features * mask).sum(dim=1) / mask.sum(dim=1)


def embed_features(features: BliprenImageFeatures, image_inputs: dict) -> torch.Tensor:
    """Return the embedding of each image from its features and the inputs that they were computed from."""
    name = "patch_attention_mask" if image_inputs.get("patch_features") is not None else "pixel_attention_mask"
    return pool_patches(features.last_hidden_state, image_inputs.get(name))


class BliprenMemoryMixin:
    """A memory for `BliprenForConditionalGeneration`.

    `generate` uses it for captions: where every image of a row stands in front of a caption prompt, one answer is asked
    for, and it is searched, not sampled. Other prompts get the model's own answer.

    Attributes:
        memory: the memory, `None` without one.
    """

    memory: BliprenMemory | None = None

    def load_memory(self, path: str | os.PathLike | None, **hub_kwargs) -> None:
        """Use another memory.

        Args:
            path: folder of a memory, checkpoint folder or Hub id with one; `None` takes the memory away.
            hub_kwargs: `revision`, `cache_dir`, `token`, `local_files_only`.

        Raises:
            ValueError: there is no memory, or it was made for another vision encoder or language model.
        """
        if path is None:
            self.memory = None
            return
        folder = Path(path)
        if not (folder / FILES[0]).is_file() and (folder := find_memory(path, hub_kwargs)) is None:
            raise ValueError(
                f"{path} has no memory: neither {FILES[0]} nor {FOLDER}/{FILES[0]} is there; make one with "
                "`blipren memory MODEL CACHE`"
            )
        memory = BliprenMemory.load(folder)
        for name, own in (
            ("encoder", memory_encoder(self.config)),
            ("language_model", memory_language_model(self.config)),
        ):
            for key, value in own.items():
                if memory.info[name][key] != value:
                    raise ValueError(
                        f"the memory {path} was made for another model: {name} {key} is {memory.info[name][key]!r} there "
                        f"and {value!r} in this model; make one with `blipren memory MODEL CACHE`"
                    )
        self.memory = memory

    def save_memory(self, checkpoint: str | os.PathLike) -> None:
        """Write the memory into the folder `memory` of a checkpoint."""
        target = Path(checkpoint) / FOLDER
        folder = self.memory.folder
        if folder is None:
            self.memory.save(target)
        elif not (target.is_dir() and target.samefile(folder)):
            target.mkdir(parents=True, exist_ok=True)
            for name in (*FILES, INDEX):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, target / name)

    def find_neighbours(self, k: int = 5, exclude: list[str | None] | None = None, **image_inputs) -> list[list[dict]]:
        """Return the entries of the memory that are most similar to each image.

        Args:
            k: how many. exclude: ids of the images, whose own entries are left out.
            image_inputs: `pixel_values` and what belongs to them, or `patch_features`, as for the model.

        Returns:
            For each image dictionaries with `id`, `similarity` (cosine) and `captions`, least Euclidean distance first.

        Raises:
            ValueError: the model has no memory.
        """
        self._require_memory()
        features = self.get_image_features(**image_inputs, return_dict=True)
        found = self.memory.find(embed_features(features, image_inputs), k, exclude)
        result = []
        for indices, similarities in zip(found.indices.tolist(), found.similarities.tolist()):
            kept = [(entry, value) for entry, value in zip(indices, similarities) if entry >= 0]
            names = self.memory.texts["id"].take([entry for entry, _ in kept]).to_pylist()
            captions = self.memory.captions([entry for entry, _ in kept])
            result.append(
                [
                    {"id": name, "similarity": round(value, 4), "captions": own}
                    for name, (_, value), own in zip(names, kept, captions)
                ]
            )
        return result

    def _require_memory(self) -> None:
        if self.memory is None:
            raise ValueError("the model has no memory: load one with load_memory")

    def _uses_memory(self, use_memory: bool | None, features, kwargs: dict) -> bool:
        """Return whether an answer of `generate` goes through the memory; by default wherever that makes sense."""
        if use_memory is False or (self.memory is None and use_memory is None):
            return False
        config = kwargs.get("generation_config") or self.generation_config
        given = {name: kwargs.get(name, getattr(config, name, None)) for name in ("do_sample", "num_return_sequences")}
        reasons = {
            "the model has no memory: load one with load_memory": self.memory is None,
            "there is no image": features is None,
            "it needs input_ids": kwargs.get("input_ids") is None,
            "answers are sampled": bool(given["do_sample"]),
            "several answers are asked for": (given["num_return_sequences"] or 1) != 1,
            "a key-value cache is given": any(kwargs.get(n) is not None for n in _CACHES),
            "scores, a stream or assisted generation are asked for": any(kwargs.get(n) for n in _OWN_DISTRIBUTION),
        }
        reason = next((text for text, true in reasons.items() if true), None)
        if reason is None and len(features.pooler_output) != len(kwargs["input_ids"]):
            reason = "rows have another number of images than one"
        if reason is None and not self._caption_rows(kwargs).any():
            reason = "no row has a caption prompt"
        if use_memory and reason is not None:
            raise ValueError(f"use_memory=True, but {reason}")
        return reason is None

    def _caption_rows(self, kwargs: dict) -> torch.Tensor:
        """Return which rows are a caption prompt behind one image."""
        prompts = [tuple(prompt) for prompt in self.memory.info["prompts"]]
        return torch.tensor([tuple(row.tolist()) in prompts for row in self._prompts(kwargs)])

    def _prompts(self, kwargs: dict) -> list[torch.Tensor]:
        """Return the tokens of each row without placeholders and padding."""
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        kept = ids != self.config.image_token_id
        kept = kept if mask is None else kept & mask.bool()
        return [row[own] for row, own in zip(ids, kept)]

    @torch.no_grad()
    def rank_captions(self, **kwargs) -> list[list[Candidate]]:
        """Return the candidates of each row, best first; arguments are those of `generate`.

        Rows that are no caption prompt have one candidate, the model's own answer.

        Raises:
            ValueError: the model has no memory.
        """
        self._require_memory()
        image_inputs = {key: kwargs.pop(key) for key in IMAGE_INPUTS if key in kwargs}
        features = self.get_image_features(**image_inputs, return_dict=True)
        kwargs["mm_encoder_outputs"] = {"image": features}
        return self._rank(embed_features(features, image_inputs), kwargs)

    def _generate_with_memory(self, embeddings: torch.Tensor, kwargs: dict) -> torch.LongTensor:
        """Return the best candidate of each row behind its prompt, as `generate` does."""
        ids = kwargs["input_ids"]
        ranked = self._rank(embeddings, kwargs)
        end, pad = self.memory.info["end"], self.generation_config.pad_token_id
        pad = kwargs.get("pad_token_id", pad if pad is not None else end)
        most = self._most_new_tokens(kwargs, ids.shape[1])
        chosen = [torch.tensor([*own[0].tokens, end][:most], device=ids.device) for own in ranked]
        answers = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=pad)
        return torch.cat([ids, answers.to(ids.dtype)], dim=1)

    def _rank(self, embeddings: torch.Tensor, kwargs: dict) -> list[list[Candidate]]:
        memory, settings = self.memory, self.memory.settings
        ids, captioned = kwargs["input_ids"], self._caption_rows(kwargs).tolist()
        length = ids.shape[1]
        found = memory.find(embeddings, max(memory.num_regressed, settings.guides))
        near = [row[row >= 0] for row in found.indices]
        queries = memory.standardise(embeddings)
        regressions = [
            memory.regress(q, n[: memory.num_regressed]) if c else None for q, n, c in zip(queries, near, captioned)
        ]
        generated: list[list[list[int]]] = [[] for _ in captioned]
        finished: list[list[bool]] = [[] for _ in captioned]
        models = [self._ngram_model(q, n) if c else None for q, n, c in zip(queries, near, captioned)]
        for weight in settings.guidance:
            options = {"num_return_sequences": 1}
            if weight:
                beams = settings.num_beams
                guide = NgramGuidance(models, weight, length, beams)
                processors = [*(kwargs.get("logits_processor") or []), guide]
                options = {
                    "num_beams": beams,
                    "num_return_sequences": beams,
                    "logits_processor": LogitsProcessorList(processors),
                }
            answers = self.generate(**{**kwargs, **options, "use_memory": False})[:, length:].tolist()
            for row, answer in enumerate(answers):
                row = row // options["num_return_sequences"]
                place = next((i for i, token in enumerate(answer) if token in self._ends()), None)
                generated[row].append(answer[:place])
                finished[row].append(place is not None)
        most, prompts = self._most_new_tokens(kwargs, length), self._prompts(kwargs)
        result = []
        for row, regression in enumerate(regressions):
            if regression is None:
                result.append([Candidate(generated[row][0], 0.0, False)])
                continue
            table, weights = regression
            own = [answer for answer, ended in zip(generated[row], finished[row]) if ended and answer]
            own = own or generated[row][:1]
            others = memory.tokens(near[row][: settings.retrieved].tolist())
            retrieved = [caption for captions in others for caption in captions if len(caption) < most]
            candidates = list(dict.fromkeys(map(tuple, own + retrieved)))
            candidates, scores = table.search(
                candidates, weights, settings.joins, settings.joined, most - 1, doubt_weight(memory)
            )
            if settings.fluency:
                best = np.argsort(-scores, kind="stable")[: settings.read]
                likelihoods = self._log_likelihoods([candidates[i] for i in best], prompts[row])
                fluency = np.full(len(candidates), likelihoods.min())  # of the others, which would not be chosen
                fluency[best] = likelihoods
                scores = scores + settings.fluency * fluency
            known = memory.are_copies(candidates)
            scores = scores - settings.copy_penalty * known
            order = np.argsort(-scores, kind="stable")
            result.append([Candidate(list(candidates[i]), float(scores[i]), bool(known[i])) for i in order])
        return result

    def _log_likelihoods(self, captions: list[tuple[int, ...]], prompt: torch.Tensor) -> np.ndarray:
        """Return the log-likelihood of each caption and its end behind a prompt without an image, `(captions,)`."""
        end = self.memory.info["end"]
        rows = [[*prompt.tolist(), *caption, end] for caption in captions]
        first, width = max(1, len(prompt)), max(map(len, rows))
        ids = torch.tensor([row + [end] * (width - len(row)) for row in rows], device=self.device)
        places = torch.tensor(
            [row * width + i for row, own in enumerate(rows) for i in range(first - 1, len(own) - 1)]
        )
        logits = self(input_ids=ids, logits_at=places.to(self.device), use_cache=False).logits.float()
        losses = F.cross_entropy(logits, ids.flatten()[places + 1], reduction="none").cpu()
        return np.bincount((places // width).numpy(), -losses.double().numpy())

    def _ngram_model(self, query: torch.Tensor, near: torch.Tensor) -> NgramModel:
        """Return the n-gram model of the nearest entries' captions, each weighted by its similarity."""
        entries = near[: self.memory.settings.guides]
        known = self.memory.embeddings[entries].float()
        distances = (known - query).square().sum(dim=1)
        weights = torch.exp(-(distances - distances.min()) / self.memory.statistics["scale"]).tolist()
        end = self.memory.info["end"]
        pairs = [
            (caption + [end], w) for own, w in zip(self.memory.tokens(entries.tolist()), weights) for caption in own
        ]
        return NgramModel([caption for caption, _ in pairs], [weight for _, weight in pairs])

    def _ends(self) -> set[int]:
        ends = self.generation_config.eos_token_id
        return {self.memory.info["end"], *(ends if isinstance(ends, list) else [ends])}

    def _most_new_tokens(self, kwargs: dict, length: int) -> int:
        config = kwargs.get("generation_config") or self.generation_config
        most = kwargs.get("max_new_tokens", config.max_new_tokens)
        if most is None:
            most = (kwargs.get("max_length", config.max_length) or 20 + length) - length
        return most


__all__ = ["BliprenMemoryMixin", "Candidate", "memory_encoder", "memory_language_model", "pool_patches"]
