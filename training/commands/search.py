"""Search the images of a data set by a text or an image."""

from dataclasses import dataclass
from pathlib import Path

from blipren.training.arguments import check_checkpoint, check_dataset
from blipren.training.data.sources.settings import SourceSettings
from blipren.training.errors import UsageError, UserError
from blipren.training.settings import positional


@dataclass(kw_only=True)
class SearchSettings(SourceSettings):
    """`blipren search`: images that fit a query."""

    dataset: str = positional()
    """A data set, folder of images, or feature cache."""
    query: str = positional()
    """What to look for, or an image file that others should be like."""
    out: str = "search"
    """Folder of results.json, sheet.png and the index, which the next query uses again."""
    model: str | None = None
    """Checkpoint of `blipren align` whose embeddings are compared; without it the words of captions are."""
    top: int = 20
    """Images to find."""
    split: str | None = None
    """Search only this split of a data set."""
    pictures: str | None = None
    """Data set with the pictures of a feature cache, for the sheet."""
    batch_size: int = 32
    """Images that are embedded together."""
    workers: int | None = None
    """Processes that decode pictures; one less than the cores when not given, 0 for none."""
    device: str = "auto"
    """Where the model runs: auto, cpu, cuda, cuda:1, mps."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("top", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.model is None and Path(self.query).is_file():
            raise UsageError("an image as the query needs embeddings: give --model ALIGNED")


def run(settings: SearchSettings) -> int | None:
    """Run the command. Returns the exit status."""
    if settings.model is not None:
        check_checkpoint(settings.model)
    check_dataset(settings.dataset)
    if Path(settings.out).is_file():
        raise UserError(f"{settings.out} is a file; OUT is a folder")

    from blipren.training.search.run import search

    search(settings)
