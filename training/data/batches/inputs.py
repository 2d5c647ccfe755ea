"""What `train` reads: feature caches, or images as they come, as sources of batches."""

import re
from collections import Counter

import numpy as np
import torch

from blipren.training.commands.train import TrainSettings
from blipren.training.data.batches.rows import VIEW, generator
from blipren.training.data.cache import FeatureCache
from blipren.training.data.cache.prepare import PrepareConfig, Prepared, cut_view, prepare_row
from blipren.training.data.cache.tokens import build_table
from blipren.training.data.sources.near_duplicates import NearIndex
from blipren.training.data.sources.open_rows import open_rows
from blipren.training.data.sources.splits import SPLITS
from blipren.training.errors import UsageError, UserError

SIDES = re.compile(r"\b(left|right)\b|\d", re.IGNORECASE)


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


class ImageSource:
    """One split of a data set, its images read, decoded and resized as batches need them."""

    weight = 1.0

    def __init__(self, rows: list[Prepared], model, processor, augment: bool):
        if model.config.num_visual_tokens is None:
            raise UserError("online needs a fixed number of visual tokens: use connector qformer, or a feature cache")
        self.rows, self.augment = rows, augment
        self.image_processor = processor.image_processor
        self.per_image = model.config.num_visual_tokens
        self.ids = [row.row.id for row in rows]
        self.texts = build_table([r.prompts for r in rows], [r.answers for r in rows], processor)

    def visual_tokens(self, image: int) -> int:
        return self.per_image

    def inputs(self, images: list[int], seed: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
        pictures = []
        for image in images:
            prepared = self.rows[image]
            picture = prepared.row.load()
            if self.augment and seed is not None:
                view = 1 + int(generator(*seed, VIEW, image).integers(1 << 30))
                picture = cut_view(picture, view, prepared.image_hash, may_mirror(prepared), 0.6, keep_size=False)
            pictures.append(picture)
        return dict(self.image_processor(images=pictures, return_tensors="pt"))

    def references(self) -> dict[int, list[str]]:
        found = {}
        for image, row in enumerate(self.rows):
            captions = [answer for prompt, answer in zip(row.prompts, row.answers) if prompt is None]
            if captions:
                found[image] = captions
        return found


def may_mirror(prepared: Prepared) -> bool:
    """Whether no text of an image would be wrong in a mirror."""
    return not any(SIDES.search(text) for text in [*prepared.answers, *filter(None, prepared.prompts)])


def read_images(settings: TrainSettings, processor) -> dict[str, list[Prepared]]:
    """The rows of a data set by split, filtered as `embed` filters them; training images that are nearly a held-out
    one are left out. Every image is decoded once for that."""
    source = open_rows(settings.cache, **settings.source_options())
    config = PrepareConfig(
        image_processor=processor.image_processor,
        validation_share=settings.validation_share,
        test_share=settings.test_share,
    )
    splits: dict[str, list[Prepared]] = {split: [] for split in SPLITS}
    rejected: Counter[str] = Counter()
    for row in source:
        prepared, _, refused = prepare_row(row, config)
        rejected.update(line["reason"] for line in refused if line["kind"] == "row")
        if prepared is not None:
            splits[prepared.split].append(prepared)
    held_out, train = splits["validation"] + splits["test"], splits["train"]
    near: dict[int, int] = {}
    if held_out and train:
        index = NearIndex(np.array([p.phash for p in held_out], np.uint64), np.stack([p.thumb for p in held_out]))
        near = index.find(np.array([p.phash for p in train], np.uint64), np.stack([p.thumb for p in train]))
    splits["train"] = [p for i, p in enumerate(train) if i not in near]
    reasons = ", ".join(f"{reason} {count}" for reason, count in rejected.most_common()) or "none"
    print(
        f"online {source.describe()}: train {len(splits['train']):,}, validation {len(splits['validation']):,}; "
        f"rejected: {reasons}; near duplicates of held-out images left out: {len(near):,}"
    )
    return splits


def open_sources(settings: TrainSettings, model, processor) -> tuple[list, CacheSource | ImageSource | None]:
    """Training sources with their weights, and the validation source (of the first cache that has one)."""
    if settings.online:
        splits = read_images(settings, processor)
        if not splits["train"]:
            raise UserError(f"{settings.cache} has no image in its train split")
        validation = ImageSource(splits["validation"], model, processor, False) if splits["validation"] else None
        return [ImageSource(splits["train"], model, processor, settings.augment)], validation
    return open_caches(settings, model, processor)


def open_caches(settings: TrainSettings, model, processor) -> tuple[list[CacheSource], CacheSource | None]:
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
