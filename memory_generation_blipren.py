"""The memory of a model: loading, saving, and the neighbours of an image."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from .consensus_blipren import NgramModel
from .image_features_blipren import BliprenImageFeatures
from .memory_blipren import FILES, FOLDER, INDEX, BliprenMemory, find_memory

HALF_DOUBTED = 180  # entries with which doubts about words have half the weight of a large memory


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

    In a small memory most words are in the captions of few images, so that regression predicts their absence from a new one:
    doubts then differ more between candidates, while predicted scores do not.
    """
    return memory.settings.invention_penalty * len(memory) / (len(memory) + HALF_DOUBTED)


def pool_patches(patch_features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the embedding of each image, `(images, width)` in float32: the mean of its patch features."""
    patch_features = patch_features.float()
    if mask is None:
        return patch_features.mean(dim=1)
    mask = mask.to(patch_features)[..., None]
    return (patch_features * mask).sum(dim=1) / mask.sum(dim=1)


def masked_patches(features: BliprenImageFeatures, image_inputs: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the patch features of images and their mask, from the features and the inputs that they were computed from."""
    name = "patch_attention_mask" if image_inputs.get("patch_features") is not None else "pixel_attention_mask"
    return features.last_hidden_state, image_inputs.get(name)


def load_part(
    model_config, kind: str, path: str | os.PathLike, first: str, find: Callable, part: type, hub_kwargs: dict
):
    """Return a memory or a reranker for a model.

    Args:
        kind: memory or reranker. path: its folder, a checkpoint folder or Hub id with one. first: its first file.
        find: returns its folder in a checkpoint. part: its class.

    Raises:
        ValueError: there is none, or it was made for another vision encoder or language model.
    """
    folder = Path(path)
    if not (folder / first).is_file() and (folder := find(path, hub_kwargs)) is None:
        raise ValueError(
            f"{path} has no {kind}: neither {first} nor {kind}/{first} is there; make one with `blipren {kind} MODEL CACHE`"
        )
    found = part.load(folder)
    for name, own in (
        ("encoder", memory_encoder(model_config)),
        ("language_model", memory_language_model(model_config)),
    ):
        for key, value in own.items():
            if found.info[name][key] != value:
                raise ValueError(
                    f"the {kind} {path} was made for another model: {name} {key} is {found.info[name][key]!r} there and "
                    f"{value!r} in this model; make one with `blipren {kind} MODEL CACHE`"
                )
    return found


class BliprenMemoryMixin:
    """A memory for `BliprenForConditionalGeneration`.

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
        self.memory = load_part(self.config, FOLDER, path, FILES[0], find_memory, BliprenMemory, hub_kwargs)

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
        found = self.memory.find(pool_patches(*masked_patches(features, image_inputs)), k, exclude)
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


__all__ = [
    "BliprenMemoryMixin",
    "doubt_weight",
    "load_part",
    "masked_patches",
    "memory_encoder",
    "memory_language_model",
    "pool_patches",
]
