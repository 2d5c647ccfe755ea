"""What `train` reads: feature caches, or images as they come, as sources of batches."""

import torch

from blipren.training.data.batches import VIEW, generator
from blipren.training.data.cache import FeatureCache
from blipren.training.errors import UsageError, UserError
from blipren.training.settings import TrainSettings


def parse_weighted(text: str) -> list[tuple[str, float]]:
    """`a=2,b` -> [("a", 2.0), ("b", 1.0)]. Raises `UsageError` for a weight that is no positive number."""
    found = []
    for part in text.split(","):
        path, equals, weight = part.rpartition("=")
        if not equals:
            path, weight = part, "1"
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if not path or value <= 0:
            raise UsageError(f"cache {part!r} is not FOLDER or FOLDER=WEIGHT with a weight above 0")
        found.append((path, value))
    return found


class CacheSource:
    """One split of a feature cache. Of several cached views of an image, training draws one; validation takes the
    first."""

    def __init__(self, cache: FeatureCache, split: str, model, processor, weight: float = 1.0):
        self.cache, self.split, self.weight = cache, split, weight
        self.ids = cache.ids(split)
        self.texts = cache.tokens(split, processor)
        # a Q-Former gives every image as many visual tokens; patches give theirs
        self.per_image = model.config.num_visual_tokens if model.config.connector == "qformer" else cache.num_patches
        self.num_patches = None if self.per_image is not None else list(cache.split(split)["num_patches"])

    def visual_tokens(self, image: int) -> int:
        return self.per_image if self.per_image is not None else self.num_patches[image]

    def inputs(self, images: list[int], seed: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
        views = None
        if seed is not None and self.cache.views > 1:
            views = [int(generator(*seed, VIEW, image).integers(self.cache.views)) for image in images]
        features, mask = self.cache.patch_features(self.split, images, views, dtype=None)
        return {"patch_features": features} | ({} if mask is None else {"patch_attention_mask": mask})

    def references(self) -> dict[int, list[str]]:
        """Captions (answers to no question) by image, of the images that have some."""
        rows, found = self.cache.split(self.split), {}
        for image, (prompts, answers) in enumerate(zip(rows["prompts"], rows["answers"])):
            captions = [answer for prompt, answer in zip(prompts, answers) if prompt is None]
            if captions:
                found[image] = captions
        return found


def open_sources(settings: TrainSettings, model, processor) -> tuple[list[CacheSource], CacheSource | None]:
    """Training sources with their weights, and the validation source (of the first cache that has one)."""
    train, validation = [], None
    for path, weight in parse_weighted(settings.cache):
        cache = FeatureCache.open(path)
        cache.check_model(model, processor)
        if not cache.num_rows("train"):
            raise UserError(f"cache {path} has no image in its train split: embed a dataset that has one")
        train.append(CacheSource(cache, "train", model, processor, weight))
        if validation is None and cache.num_rows("validation"):
            validation = CacheSource(cache, "validation", model, processor)
    return train, validation
