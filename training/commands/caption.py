"""Caption images, or answer a question about them."""

from dataclasses import dataclass

from blipren.training.settings import Settings, choice, positional


@dataclass(kw_only=True)
class CaptionSettings(Settings):
    """`blipren caption`: captions for images."""

    model: str = positional()
    """Checkpoint folder or Hub id."""
    images: list[str] = positional()
    """Image files."""
    prompt: str | None = None
    """Prompt or question; by default the model's own caption prompt."""
    json: bool = False
    """One JSON object a line instead of text."""
    max_new_tokens: int = 64
    """Longest answer."""
    num_beams: int = 1
    """Beams; 1 is greedy."""
    batch_size: int = 16
    """Images that are captioned together."""
    device: str = choice("auto", "cpu", "cuda", "mps", default="auto")
    """Where to compute."""


def run(settings: CaptionSettings) -> int | None:
    """Run the command. Returns the exit status."""
    from blipren.training.evaluation.captioning import caption

    return caption(settings)
