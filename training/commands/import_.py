"""Import a BLIP-2 or InstructBLIP model as a checkpoint."""

from dataclasses import dataclass

from blipren.training.settings import Settings, positional


@dataclass(kw_only=True)
class ImportSettings(Settings):
    """`blipren import`: a BLIP-2 or InstructBLIP model of transformers as a full checkpoint."""

    source: str = positional()
    """Folder or Hub id, optionally with @revision, such as Salesforce/blip2-opt-2.7b."""
    out: str = positional()
    """Folder for the checkpoint."""


def run(settings: ImportSettings) -> int | None:
    """Run the command. Returns the exit status."""
    from blipren.training.hub.convert import import_model

    return import_model(settings)
