"""The images and texts that batches are made of: from feature caches, or decoded as they are needed."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch

from blipren.training.arguments import split_weights
from blipren.training.data.batches.blocks import Block, PromptEncoder, build_blocks
from blipren.training.data.batches.draws import VIEW, seeded_generator
from blipren.training.data.batches.samples import CachedSamples
from blipren.training.data.cache import FeatureCache
from blipren.training.data.cache.prepare import PrepareConfig, Prepared, prepare_row
from blipren.training.data.cache.tokens import TokenTable, build_table
from blipren.training.data.cache.views import can_be_mirrored, cut_view, draw_view
from blipren.training.data.sources.boxes import category_names
from blipren.training.data.sources.near_duplicates import NearIndex
from blipren.training.data.sources.open_rows import grounding_options, open_rows
from blipren.training.data.sources.settings import GroundingSettings
from blipren.training.data.sources.splits import SPLITS
from blipren.training.errors import UserError


class TrainingData(Protocol):
    """One split of what is trained on."""

    ids: Sequence[str]
    """Stable id of each image; messages name it."""
    weight: float
    """How often an epoch takes each unit."""

    def __len__(self) -> int:
        """Number of units: images with their answers, or conversations about the same images."""

    def visual_tokens(self, image: int) -> int:
        """Number of placeholders of an image."""

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

        Args:
            number: of this data among those that are trained on.
            random: draws prompts and answers; None (validation) draws nothing.
            layout: a `Layout`, with the limits of a block.
            seed: as in `inputs`, of which the texts of a view depend.
        """

    def answer_ids(self, unit: int) -> list[list[int]]:
        """Return the ids of the answers of a unit, each with its end token."""

    def longest_row(self, prompts: PromptEncoder) -> int:
        """Return a bound of the tokens of the longest prompt and answer together."""

    def inputs(self, images: list[int], seed: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
        """Return the model inputs of some images, such as `patch_features` `[images, patches, width]`.

        Args:
            seed: seed of what is drawn (views, augmentation), by `seeded_generator(*seed, VIEW, image)`; None draws
                nothing.
        """


class AnswersOfImages:
    """What cached and decoded images have in common: each unit is an image with its answers."""

    texts: TokenTable
    """Prompts and answers of each image."""
    ids: Sequence[str]
    units: Sequence[int]
    """The images that have an answer."""

    def __len__(self) -> int:
        return len(self.units)

    def draw_view(self, image: int, seed: tuple[int, ...] | None) -> int:
        """Return the number of the view of an image whose features and texts a batch has."""
        return 0

    def blocks(
        self,
        unit: int,
        number: int,
        prompts: PromptEncoder,
        random: np.random.Generator | None,
        layout,
        seed: tuple[int, ...] | None = None,
    ) -> list[Block]:
        image = int(self.units[unit])
        return build_blocks(
            (number, image),
            self.texts.answers(image, self.draw_view(image, seed)),
            self.visual_tokens(image),
            prompts,
            random,
            layout.answers_per_image,
            layout.max_answer_tokens,
            layout.row_tokens,
        )

    def answer_ids(self, unit: int) -> list[list[int]]:
        return [ids for _, ids in self.texts.answers(int(self.units[unit]))]

    def longest_row(self, prompts: PromptEncoder) -> int:
        visual = max(self.visual_tokens(int(image)) for image in self.units)
        texts = [p for p in self.texts.prompts if p is not None] + prompts.caption_prompts
        longest = max(sum(map(len, prompts.encode(p, s, visual))) for p in texts for s in prompts.system_prompts)
        return longest + int(np.diff(self.texts.starts).max())


class CachedData(AnswersOfImages):
    """One split of a feature cache. Training draws one of the cached views of an image; validation takes the first."""

    def __init__(self, cache: FeatureCache, split: str, model, processor, weight: float = 1.0):
        self.cache, self.split, self.weight = cache, split, weight
        self.ids = cache.ids(split)
        self.texts = cache.tokens(split, processor)
        self.units = np.flatnonzero(np.diff(self.texts.first))  # others are there for conversations
        # None: without a Q-Former, an image has as many visual tokens as patches
        self.per_image = cache.num_patches and model.config.count_visual_tokens(cache.num_patches)
        if self.per_image is None and model.config.connector == "qformer":
            self.per_image = model.config.num_visual_tokens
        self.num_patches = None if self.per_image is not None else list(cache.split(split)["num_patches"])

    def visual_tokens(self, image: int) -> int:
        return self.per_image if self.per_image is not None else self.num_patches[image]

    def draw_view(self, image: int, seed: tuple[int, ...] | None) -> int:
        if seed is None or self.cache.views == 1:
            return 0
        return int(seeded_generator(*seed, VIEW, image).integers(self.cache.views))

    def inputs(self, images: list[int], seed: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
        views = [self.draw_view(image, seed) for image in images]
        features, mask = self.cache.patch_features(self.split, images, views, dtype=None)
        return {"patch_features": features} | ({} if mask is None else {"patch_attention_mask": mask})

    def references(self) -> dict[int, list[str]]:
        """Return the captions of each image that has some."""
        rows = self.cache.split(self.split)
        return find_captions(zip(rows["prompts"], rows["answers"]))


class OnlineData(AnswersOfImages):
    """One split of a data set. Images are read, decoded and resized when a batch needs them."""

    weight = 1.0

    def __init__(self, rows: list[Prepared], model, processor, augment: bool):
        if model.config.num_visual_tokens is None:
            raise UserError("online needs a fixed number of visual tokens: use connector qformer, or a feature cache")
        self.rows, self.augment = rows, augment
        self.image_processor = processor.image_processor
        self.per_image = model.config.num_visual_tokens
        self.ids = [row.row.id for row in rows]
        self.texts = build_table([r.prompts for r in rows], [r.answers for r in rows], processor)
        self.units = range(len(rows))

    def visual_tokens(self, image: int) -> int:
        return self.per_image

    def inputs(self, images: list[int], seed: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
        pictures = []
        for image in images:
            prepared = self.rows[image]
            picture = prepared.row.load()
            if self.augment and seed is not None:
                number = 1 + int(seeded_generator(*seed, VIEW, image).integers(1 << 30))
                number = 0 if prepared.places[0] else number
                flip = can_be_mirrored([*prepared.answers, *prepared.prompts])
                view = draw_view(picture.size, number, prepared.image_hash, flip, 0.6)
                picture = cut_view(picture, view, keep_size=False)
            pictures.append(picture)
        return dict(self.image_processor(images=pictures, return_tensors="pt"))

    def references(self) -> dict[int, list[str]]:
        """Return the captions of each image that has some."""
        return find_captions((row.prompts, row.answers) for row in self.rows)


def find_captions(texts: Iterable[tuple[Sequence[str | None], Sequence[str]]]) -> dict[int, list[str]]:
    """Return image -> its captions (answers to the default caption prompt), of the images that have some.

    Args:
        texts: prompts and answers of each image.
    """
    found = {}
    for image, (prompts, answers) in enumerate(texts):
        captions = [answer for prompt, answer in zip(prompts, answers) if prompt is None]
        if captions:
            found[image] = captions
    return found


def read_images(dataset: str, processor, source: GroundingSettings) -> dict[str, list[Prepared]]:
    """Read the rows of a data set by split, filtered as `embed` filters them. Every image is decoded once.

    Training images that are nearly a held-out image are left out.
    """
    rows = open_rows(dataset, **source.source_options(), **grounding_options(source))
    if rows.columns.video:
        raise UserError(
            f"{dataset} holds videos: online training takes images, so embed it into a feature cache first"
        )
    config = PrepareConfig(
        image_processor=processor.image_processor,
        validation_share=source.validation_share,
        test_share=source.test_share,
        grounding=tuple(source.grounding),
        bbox_format=source.bbox_format,
        category_names=category_names(rows.features),
    )
    splits: dict[str, list[Prepared]] = {split: [] for split in SPLITS}
    rejected: Counter[str] = Counter()
    for row in rows:
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
        f"online {rows.describe()}: train {len(splits['train']):,}, validation {len(splits['validation']):,}; "
        f"rejected: {reasons}; near duplicates of held-out images left out: {len(near):,}"
    )
    return splits


def open_online(
    dataset: str, model, processor, source: GroundingSettings, augment: bool
) -> tuple[list[OnlineData], list[OnlineData]]:
    """Open a data set of images for training. Returns its train split, and its validation split if there is one."""
    splits = read_images(dataset, processor, source)
    if not splits["train"]:
        raise UserError(f"{dataset} has no image in its train split")
    if augment and (whole := sum(bool(row.places[0]) for row in splits["train"])):
        print(f"images with boxes or points, shown whole and never mirrored: {whole:,}")
    validation = [OnlineData(splits["validation"], model, processor, False)] if splits["validation"] else []
    return [OnlineData(splits["train"], model, processor, augment)], validation


def read_caches(caches: str) -> list[tuple[FeatureCache, float]]:
    """Open feature caches to train on; no model is needed for it.

    Args:
        caches: folders, with or without weights: `A=2,B`.

    Returns:
        Each cache with its weight.

    Raises:
        UserError: a cache is not there, its train split is empty, or an image has no text to learn.
    """
    found = []
    for path, weight in split_weights(caches):
        cache = FeatureCache.open(path)
        if not cache.num_rows("train") and not cache.num_samples("train"):
            raise UserError(f"cache {path} has no image in its train split: embed a dataset that has one")
        for split in ("train", "validation") if "samples" not in cache.info else ():
            if missing := cache.num_without_texts(split):
                raise UserError(
                    f"cache {path} has neither caption nor answer for {missing:,} of the {cache.num_rows(split):,} "
                    f"images of its {split} split; embed the data set again, which rejects such rows"
                )
        found.append((cache, 1.0 if weight is None else weight))
    return found


def open_split(
    cache: FeatureCache, split: str, model, processor, weight: float = 1.0, traces: str = "learn"
) -> list[CachedData | CachedSamples]:
    """Open what a split of a cache has: captions and answers to questions, conversations, or both."""
    found: list[CachedData | CachedSamples] = []
    if cache.num_rows(split):
        data = CachedData(cache, split, model, processor, weight)
        found += [data] if len(data) else []
    if cache.num_samples(split):
        found.append(CachedSamples(cache, split, model, processor, weight, traces=traces))
    return found


def open_caches(
    caches: Sequence[tuple[FeatureCache, float]], model, processor, traces: str = "learn"
) -> tuple[list[CachedData | CachedSamples], list[CachedData | CachedSamples]]:
    """Open feature caches and their weights for training.

    Returns:
        The train split of each, and the validation split of the first that has one.

    Raises:
        UserError: another encoder made a cache.
    """
    train: list[CachedData | CachedSamples] = []
    validation: list[CachedData | CachedSamples] = []
    for cache, weight in caches:
        cache.check_model(model, processor)
        train += open_split(cache, "train", model, processor, weight, traces)
        validation = validation or open_split(cache, "validation", model, processor, traces=traces)
    return train, validation
