"""Caption images, or answer a question about them."""

from dataclasses import dataclass

from blipren.training.arguments import check_checkpoint, check_files
from blipren.training.evaluation.settings import GenerationSettings
from blipren.training.settings import choice, positional


@dataclass(kw_only=True)
class CaptionSettings(GenerationSettings):
    """`blipren caption`: captions for images."""

    model: str = positional()
    """Checkpoint folder or Hub id."""
    images: list[str] = positional()
    """Image files."""
    json: bool = False
    """Print one JSON object a line instead of text."""
    device: str = choice("auto", "cpu", "cuda", "mps", default="auto")
    """Device to compute on."""


def run(settings: CaptionSettings) -> int | None:
    """Run the command. Returns the exit status."""
    check_checkpoint(settings.model)
    check_files(*settings.images)

    from blipren.training.evaluation.captioning import caption

    return caption(settings)
