"""Embed a data set once into a feature cache."""

from dataclasses import dataclass

from blipren.training.data.sources.settings import SourceSettings
from blipren.training.errors import UsageError
from blipren.training.settings import choice, positional


@dataclass(kw_only=True)
class EmbedSettings(SourceSettings):
    """`blipren embed`: runs the frozen encoder once on every image and writes the feature cache."""

    model: str = positional()
    """Checkpoint folder or Hub id whose vision encoder embeds."""
    dataset: str = positional()
    """Anything that datasets.load_dataset reads: Hub id, folder with metadata.jsonl, Parquet, WebDataset tars; several
    as A,B (all rows of both) or A=2,B=1 (drawn in these proportions)."""
    cache: str = positional()
    """Folder of the feature cache."""
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
    min_words: int = 1
    """Caption filter: fewest words."""
    max_words: int | None = 256
    """Caption filter: most words; null switches off."""
    max_chars: int | None = 2000
    """Caption filter: most characters; null switches off."""
    max_repetition: float | None = 0.5
    """Caption filter: largest share of repeated three-word sequences; null switches off."""
    markup: bool = True
    """Caption filter: refuse HTML tags, entities, URLs and file names."""
    boilerplate: bool = True
    """Caption filter: refuse credits, shop words, camera file names, refusals of other models."""
    script: str | None = None
    """Caption filter: script of the letters, as Unicode names it (LATIN, CYRILLIC, CJK, ...)."""
    min_script_share: float = 0.9
    """Caption filter: least share of letters in that script."""
    tidy: bool = False
    """Captions: take away doubled white space and spaces before punctuation marks, as in "a dog runs ."."""
    duplicates: bool = True
    """Caption filter: keep one of equal captions of an image."""
    max_images_per_caption: int | None = None
    """Caption filter: refuse a caption that more images than this have word for word."""
    min_similarity: float | None = None
    """Caption filter, for SigLIP and CLIP: least cosine between image and caption in the encoder's own space."""
    keep_best: int | None = None
    """Caption filter, for SigLIP and CLIP: keep the k captions of an image that are most similar to it."""
    batch_size: int = 32
    """Views that the encoder takes at a time."""
    workers: int | None = None
    """Processes that decode; one less than the cores when not given, 0 for none."""
    rows_per_shard: int = 1024
    """Rows that are redone at most after a crash, and at most in an Arrow file."""
    device: str = "auto"
    """Where the encoder runs: auto, cpu, cuda, cuda:1, mps."""
    precision: str = choice("auto", "float32", "bfloat16", "float16", default="auto")
    """Precision that the encoder computes in: the checkpoint's own by default, float32 on a CPU."""
    engine: str = choice("local", "ray", default="local")
    """local: this machine; ray: Ray Data on a cluster (pip install blipren[ray]), where DATASET and CACHE may be on any
    file system that fsspec knows."""
    actors: int | None = None
    """Ray: encoders at work at the same time; one a GPU, or one for four cores, when not given."""
    limit: int | None = None
    """Take only the first rows."""
    seed: int = 0
    """Seed of a weighted mixture's order."""
    dry_run: bool = False
    """Only show what would be cached and what would be rejected; nothing is embedded or written."""
    verify: bool = False
    """Check every byte of a finished cache against its checksums, and write nothing."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("views", "batch_size", "rows_per_shard"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("view_scale", "min_script_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        for name in ("workers", "limit", "keep_best", "actors"):
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must not be negative")


def run(settings: EmbedSettings) -> int | None:
    """Run the command. Returns the exit status."""
    from blipren.training.data.cache.embed import embed

    return embed(settings)
