"""Build, train, judge and use a small model, without network or data."""

from dataclasses import dataclass

from blipren.training.settings import Settings


@dataclass(kw_only=True)
class QuickstartSettings(Settings):
    """`blipren quickstart`: builds, trains, judges and uses a small model, without network or data."""

    out: str = "quickstart-out"
    """Folder for the scenes, the model, the summary and the pictures."""
    align: bool = True
    """Stage 1 in front of the captioning stage; recall before and after it is shown."""
    seed: int = 0
    """Seed of the scenes, of the new weights and of the training."""


def run(settings: QuickstartSettings) -> int | None:
    """Run the command. Returns the exit status."""
    from blipren.training.quickstart.run import quickstart

    return quickstart(settings)
