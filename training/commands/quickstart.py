"""Build, train, evaluate and use a small model, without network or data."""

from dataclasses import dataclass
from pathlib import Path

from blipren.training.settings import Settings, choice

WORLDS = sorted(p.stem for p in (Path(__file__).parents[1] / "quickstart" / "worlds").glob("[!_]*.py"))


@dataclass(kw_only=True)
class QuickstartSettings(Settings):
    """`blipren quickstart`: a small model from end to end, without network or data."""

    out: str = "quickstart-out"
    """Folder for the scenes, the model, the summary and the pictures."""
    world: str = choice(*WORLDS, default="captions")
    """What is drawn, trained and shown. Each world is described in the first lines of its file in quickstart/worlds/."""
    align: bool = True
    """Run stage 1 (align) before the captioning stage, and show recall before and after it."""
    seed: int = 0
    """Seed of the scenes, the new weights and the training."""


def run(settings: QuickstartSettings) -> int | None:
    """Run the command. Returns the exit status."""
    from blipren.training.quickstart.run import quickstart

    return quickstart(settings)
