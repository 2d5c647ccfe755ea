"""Build, train, evaluate and use a small model, without network or data."""

from dataclasses import dataclass

from blipren.training.settings import Settings


@dataclass(kw_only=True)
class QuickstartSettings(Settings):
    """`blipren quickstart`: a small model from end to end, without network or data."""

    out: str = "quickstart-out"
    """Folder for the scenes, the model, the summary and the pictures."""
    align: bool = True
    """Run stage 1 (align) before the captioning stage, and show recall before and after it."""
    seed: int = 0
    """Seed of the scenes, the new weights and the training."""


def run(settings: QuickstartSettings) -> int | None:
    """Run the command. Returns the exit status."""
    from blipren.training.quickstart.run import quickstart

    return quickstart(settings)
