"""Train a reranker for a model: it chooses the best of the model's own captions."""

from dataclasses import dataclass
from pathlib import Path

from blipren.training.arguments import check_cache_folder, check_checkpoint
from blipren.training.errors import UsageError
from blipren.training.settings import Settings, choice, positional


@dataclass(kw_only=True)
class RerankerCommandSettings(Settings):
    """`blipren reranker`: predicts which words and n-grams people would write of an image; the model stays as it is."""

    model: str = positional()
    """Checkpoint folder or Hub id."""
    cache: str = positional()
    """Feature cache of images with captions, made by this model's encoder."""
    out: str | None = None
    """Folder for the reranker; the folder `reranker` of MODEL when not given."""
    split: str = choice("train", "validation", "test", default="train")
    """Split of the cache."""
    max_steps: int = 600
    """Steps of training."""
    batch_size: int = 64
    """Images of a step."""
    learning_rate: float = 1e-3
    """Peak learning rate; it falls to zero in a half cosine."""
    feature_dropout: float = 0.75
    """Share of patches hidden in training."""
    width: int = 150
    """Directions in which captions are compared."""
    seed: int = 0
    """Seed of weights and batches."""
    device: str = "auto"
    """Where it is trained: auto, cpu, cuda, cuda:1, mps."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_steps", "batch_size", "width"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.feature_dropout < 1:
            raise UsageError(f"feature_dropout is {self.feature_dropout}; it must lie between 0 and below 1")
        if self.out is None and not Path(self.model).is_dir():
            raise UsageError(f"{self.model} is no folder here: say by --out where the reranker goes")

    def out_folder(self) -> Path:
        """Return the folder of the reranker."""
        return Path(self.model) / "reranker" if self.out is None else Path(self.out)


def run(settings: RerankerCommandSettings) -> None:
    """Train the reranker."""
    check_checkpoint(settings.model)
    check_cache_folder(Path(settings.cache))

    from blipren.training.reranker.fit import make_reranker

    print(f"reranker: split {settings.split} of {settings.cache} -> {settings.out_folder()}")
    make_reranker(settings)
