"""Settings of `blipren quickstart`."""

from dataclasses import dataclass

from blipren.training.settings.base import Settings


@dataclass(kw_only=True)
class QuickstartSettings(Settings):
    """`blipren quickstart`: builds, trains, judges and uses a small model, without network or data."""

    out: str = "quickstart-out"
    """Folder for the scenes, the model, the summary and the pictures."""
    align: bool = True
    """Stage 1 in front of the captioning stage; recall before and after it is shown."""
    seed: int = 0
    """Seed of the scenes, of the new weights and of the training."""
