"""Make a memory of known images and their captions for a model."""

from dataclasses import dataclass
from pathlib import Path

from blipren.training.arguments import check_cache_folder, check_checkpoint
from blipren.training.errors import UsageError
from blipren.training.settings import Settings, choice, positional


@dataclass(kw_only=True)
class MemoryCommandSettings(Settings):
    """`blipren memory`: the captions of similar known images help the model; nothing is trained."""

    model: str = positional()
    """Checkpoint folder or Hub id."""
    cache: str = positional()
    """Feature cache of the known images, made by this model's encoder."""
    out: str | None = None
    """Folder for the memory; the folder `memory` of MODEL when not given."""
    split: str = choice("train", "validation", "test", default="train")
    """Split of the cache."""
    extend: bool = False
    """Add to the memory in OUT; images that it has already are left out and counted."""
    max_copies: float = 0.3
    """Share of validation images that may get a caption of the memory word for word; decides the copy penalty. 1 keeps the
    default penalty, 0.1."""
    max_new_tokens: int = 64
    """Maximum number of tokens of these images' captions."""
    num_beams: int = 1
    """Number of beams of the model's own answers to them; 1 is greedy search."""
    length_penalty: float = 1.0
    """Beam search: above 1 prefers longer answers."""
    device: str = "auto"
    """Where the model runs: auto, cpu, cuda, cuda:1, mps."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.max_copies <= 1:
            raise UsageError(f"max_copies is {self.max_copies}; it must lie between 0 and 1")
        if self.out is None and not Path(self.model).is_dir():
            raise UsageError(f"{self.model} is no folder here: say by --out where the memory goes")

    def out_folder(self) -> Path:
        """Return the folder of the memory."""
        return Path(self.model) / "memory" if self.out is None else Path(self.out)


def run(settings: MemoryCommandSettings) -> None:
    """Make the memory."""
    check_checkpoint(settings.model)
    check_cache_folder(Path(settings.cache))

    from blipren.training.memory.build import make_memory

    print(f"memory: split {settings.split} of {settings.cache} -> {settings.out_folder()}")
    make_memory(settings)
