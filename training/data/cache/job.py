"""One run of `blipren embed`: what it needs, how it finishes, and what it does with a cache that is finished."""

from __future__ import annotations

import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blipren.training.commands.embed import EmbedSettings
from blipren.training.data.cache.caption_refilter import filter_captions_again
from blipren.training.data.cache.encoder import Encoder
from blipren.training.data.cache.fingerprints import cache_fingerprint, check_same_fingerprint
from blipren.training.data.cache.prepare import PrepareConfig
from blipren.training.data.cache.reader import FeatureCache
from blipren.training.data.cache.samples.collect import SampleImages, limit_tokens
from blipren.training.data.cache.shards import as_json
from blipren.training.data.cache.similarity_filter import SimilarityScorer
from blipren.training.data.cache.summary import print_summary
from blipren.training.data.cache.tokens import name_of_tokens
from blipren.training.data.cache.writer.finish import finish_cache
from blipren.training.data.cache.writer.units import CacheWriter
from blipren.training.data.sources.boxes import category_names
from blipren.training.data.sources.caption_filter import CaptionFilter, count_captions
from blipren.training.data.sources.open_rows import grounding_options, open_rows
from blipren.training.data.sources.rows import Source
from blipren.training.data.sources.splits import SPLITS
from blipren.training.engine.loading import load_checkpoint
from blipren.training.errors import UserError
from blipren.training.files import write_atomically


@dataclass
class EmbedJob:
    """Everything that embedding a unit needs. It is a function of the settings, so that every process makes the same."""

    source: Source
    processor: Any
    encoder: Encoder
    config: PrepareConfig
    scorer: SimilarityScorer | None
    num_patches: int | None
    """Patches of an image; None where images differ."""
    values: int | None
    """Features of a row, of all its views; None where rows differ."""
    fingerprint: dict[str, Any]
    settings: EmbedSettings
    """Without `limit` where the source has it already."""
    samples: SampleImages | None
    """The source, where it has conversations."""

    @classmethod
    def open(cls, s: EmbedSettings) -> EmbedJob:
        """Open data set and model. Raises `UserError`."""
        source, samples = open_rows(s.dataset, seed=s.seed, **s.source_options(), **grounding_options(s)), None
        rules = CaptionFilter.from_settings(s)
        counts = None
        if rules.max_images_per_caption:
            counts = count_captions((row.prompts, row.answers) for row in source)
        model, processor = load_checkpoint(s.model)
        if source.has_conversations:
            fit = None
            if s.max_tokens is not None:
                count = processor.num_visual_tokens or processor.image_processor.max_num_patches
                fit = limit_tokens(processor, s.max_tokens, s.cut_turns, count)
            source = samples = SampleImages(source, s.limit, fit)
        encoder = Encoder(model, processor.image_processor, s.device, s.precision)
        config = PrepareConfig(
            image_processor=processor.image_processor,
            rules=rules,
            caption_counts=counts,
            validation_share=s.validation_share,
            test_share=s.test_share,
            views=s.views,
            view_scale=s.view_scale,
            view_flip=s.view_flip,
            variable=encoder.variable,
            num_frames=model.config.num_frames if source.columns.video else None,
            grounding=tuple(s.grounding),
            bbox_format=s.bbox_format,
            category_names=category_names(source.features),
        )
        if source.columns.video and model.config.num_frames is None:
            raise UserError(
                f"{s.dataset} holds videos (column {source.columns.image}), and {s.model} takes images: make a model with "
                "`blipren new --frames 8`"
            )
        scorer = None
        if s.min_similarity is not None or s.keep_best is not None:
            scorer = SimilarityScorer((model.config.base_models or {}).get("vision") or {}, encoder.device)
        if scorer is not None and source.columns.video:
            raise UserError("min_similarity and keep_best compare captions with images; this data set holds videos")
        patches = None if encoder.variable else encoder.measure() * (config.num_frames or 1)
        values = None if patches is None else patches * encoder.hidden_size * s.views
        fingerprint = cache_fingerprint(s, source, encoder)
        if config.num_frames is not None:
            fingerprint["storage"]["num_frames"] = config.num_frames
        if encoder.has_frame_times and s.dtype == "int8":
            raise UserError("--dtype int8 cannot hold the times of frames in seconds: embed with --dtype float16")
        rest = s if samples is None else dataclasses.replace(s, limit=None)
        return cls(source, processor, encoder, config, scorer, patches, values, fingerprint, rest, samples)

    def writer(self, s: EmbedSettings, folder: Path, writer_class: type[CacheWriter] = CacheWriter) -> CacheWriter:
        """Return the writer of the cache."""
        return writer_class(
            folder,
            self.fingerprint,
            dtype=s.dtype,
            values=self.values,
            tokens=None if self.num_patches is None else self.num_patches * s.views,
            hidden_size=self.encoder.hidden_size,
            rows_per_unit=s.rows_per_shard,
            near_duplicates=s.near_duplicates,
            scores=self.scorer is not None,
            view_texts=bool(s.grounding) and s.views > 1,
        )

    def finish(self, s: EmbedSettings, cache: CacheWriter) -> dict[str, Any]:
        """Finish the cache when all its units are done, and print the summary. Returns its `cache.json`.

        Raises:
            UserError: the data set has no rows, or none could be cached.
        """
        if not cache.done_units() and not (self.samples and self.samples.rows_read):
            shutil.rmtree(cache.folder / "units")
            raise UserError(f"{s.dataset} has no rows")
        info = finish_cache(cache, {"views": s.views, "num_patches": self.num_patches}, self.samples)
        print_summary(info, cache.folder)
        if not info["counts"]["cached"] + sum(info["counts"].get("samples", {}).get(split, 0) for split in SPLITS):
            raise UserError(f"no row of {s.dataset} could be cached; the reasons are in {s.cache}/rejected.jsonl")
        return info


def reuse_cache(folder: Path, job: EmbedJob) -> None:
    """Use a finished cache as it is, or filter its captions again where only the caption filter differs.

    Raises:
        UserError: the cache was embedded with other settings, another encoder or other data.
    """
    cache = FeatureCache.open(folder)
    stored, now = ({k: v for k, v in each.items() if k != "captions"} for each in (cache.fingerprint, job.fingerprint))
    check_same_fingerprint(stored, now, folder)
    current = cache.info.get("captions") or {"settings": cache.fingerprint["captions"]}
    if current["settings"] == job.fingerprint["captions"]:
        print(f"{folder} is complete: nothing to embed")
    else:
        filter_captions_again(folder, cache.info, job.fingerprint["captions"], job.config.rules)


def write_tokens(folder: Path, processor: Any) -> None:
    """Write the token ids for the model's tokenizer and template, and their fingerprint into `cache.json`."""
    started = time.monotonic()
    cache = FeatureCache.open(folder)
    tokens = sum(len(cache.tokens(split, processor).ids) for split in SPLITS)
    tokens += sum(len(cache.sample_tokens(split, processor).ids) for split in SPLITS if cache.num_samples(split))
    name, fingerprint = name_of_tokens(cache.info, processor)
    if name not in cache.info.get("tokens", {}):
        cache.info.setdefault("tokens", {})[name] = fingerprint
        write_atomically(folder / "cache.json", as_json(cache.info))
        print(f"{tokens:,} token ids in {folder / 'tokens' / name} ({time.monotonic() - started:.1f} s)")
