"""Embed a data set once into a feature cache."""

from dataclasses import dataclass
from pathlib import Path

from blipren.training.arguments import check_cache_folder, check_checkpoint, check_dataset
from blipren.training.data.sources.settings import CaptionFilterSettings, GroundingSettings
from blipren.training.errors import UsageError, UserError
from blipren.training.settings import Settings, choice, positional


@dataclass(kw_only=True)
class StorageSettings(Settings):
    """What is stored."""

    near_duplicates: str = choice("drop", "keep", default="drop")
    """Training images that are nearly a validation or test image: left out, or kept and only counted."""
    dtype: str = choice("float16", "float32", "int8", default="float16")
    """Type of the stored features; int8 has a scale for each token."""
    views: int = 1
    """Views of each image to embed: the image itself and deterministic random crops, among which training draws."""
    view_scale: float = 0.6
    """Least share of the image's area in a view."""
    view_flip: bool = True
    """Mirror half of the views, unless the image's texts name sides or digits."""
    limit: int | None = None
    """Take only the first rows."""
    seed: int = 0
    """Seed of a weighted mixture's order."""


@dataclass(kw_only=True)
class ConversationSettings(Settings):
    """Conversations."""

    max_tokens: int | None = None
    """Refuse conversations of more tokens than this, images included, as the model's own tokenizer counts them."""
    cut_turns: bool = False
    """Leave the last turns out of such a conversation instead, as many as needed."""


@dataclass(kw_only=True)
class SimilaritySettings(Settings):
    """Caption filter by image-text similarity, for SigLIP and CLIP."""

    min_similarity: float | None = None
    """Least cosine between image and caption in the encoder's own space."""
    keep_best: int | None = None
    """Keep the k captions of an image that are most similar to it."""


@dataclass(kw_only=True)
class EngineSettings(Settings):
    """How it is computed."""

    batch_size: int = 32
    """Views that the encoder takes at a time; with scales or tiles, pieces of them."""
    workers: int | None = None
    """Processes that decode; one less than the cores when not given, 0 for none."""
    rows_per_shard: int = 1024
    """Rows of an Arrow file, and rows that are embedded again at most after a crash."""
    device: str = "auto"
    """Where the encoder runs: auto, cpu, cuda, cuda:1, mps."""
    precision: str = choice("auto", "float32", "bfloat16", "float16", default="auto")
    """Precision that the encoder computes in: the checkpoint's own by default, float32 on a CPU."""
    engine: str = choice("local", "ray", default="local")
    """local: this machine; ray: Ray Data on a cluster (pip install blipren[ray]), where DATASET and CACHE may be on any
    file system that fsspec knows."""
    actors: int | None = None
    """Ray: encoders at work at the same time; one a GPU, or one for four cores, when not given."""
    dry_run: bool = False
    """Only show what would be cached and what would be rejected; nothing is embedded or written."""
    verify: bool = False
    """Check every byte of a finished cache against its checksums, and write nothing."""


@dataclass(kw_only=True)
class EmbedSettings(
    EngineSettings, SimilaritySettings, CaptionFilterSettings, ConversationSettings, StorageSettings, GroundingSettings
):
    """`blipren embed`: runs the frozen encoder once on every image and writes the feature cache."""

    model: str = positional()
    """Checkpoint folder or Hub id whose vision encoder embeds."""
    dataset: str = positional()
    """Anything that datasets.load_dataset reads: Hub id, folder with metadata.jsonl, Parquet, WebDataset tars; several
    as A,B (all rows of both) or A=2,B=1 (drawn in these proportions)."""
    cache: str = positional()
    """Folder of the feature cache."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("views", "batch_size", "rows_per_shard", "max_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("view_scale", "min_script_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        for name in ("workers", "limit", "keep_best", "actors"):
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must not be negative")


def run(settings: EmbedSettings) -> int | None:
    """Embed a data set into a feature cache. An unfinished cache is continued, a finished one used as it is.

    Raises:
        UserError: the data set cannot be read, the cache was made otherwise, the disk is full, features are not finite.
    """
    if settings.verify:
        check_cache_folder(Path(settings.cache))
    else:
        check_checkpoint(settings.model)
        check_dataset(settings.dataset)

    from blipren.training.data.cache.engines.local import embed_units
    from blipren.training.data.cache.job import EmbedJob, reuse_cache, write_tokens
    from blipren.training.data.cache.summary import describe_plan, dry_run, verify_cache
    from blipren.training.data.cache.writer.lock import CacheLock

    if settings.verify:
        return verify_cache(settings.cache)
    job = EmbedJob.open(settings)
    print(describe_plan(settings, job.source, job.encoder, job.values))
    if settings.dry_run:
        return dry_run(job.settings, job.source, job.config)
    if settings.engine == "ray":
        from blipren.training.data.cache.engines.ray_cluster import embed_with_ray

        return embed_with_ray(settings, job)
    folder = Path(settings.cache)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; CACHE is a folder")
    with CacheLock(folder):
        if (folder / "cache.json").exists():
            reuse_cache(folder, job)
        else:
            cache = job.writer(settings, folder)
            cache.start()
            embed_units(job.settings, job.source, job.encoder, cache, job.config, job.scorer)
            job.finish(settings, cache)
        write_tokens(folder, job.processor)
    return None
