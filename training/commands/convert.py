"""Convert between bridge and full checkpoints."""

from dataclasses import dataclass
from pathlib import Path

from blipren.training.arguments import check_checkpoint
from blipren.training.files import check_new_folder
from blipren.training.settings import Settings, choice, positional


@dataclass(kw_only=True)
class ConvertSettings(Settings):
    """`blipren convert`: bridge checkpoint <-> full checkpoint."""

    model: str = positional()
    """Checkpoint folder or Hub id."""
    out: str = positional()
    """Folder for the new checkpoint."""
    to: str = choice("full", "bridge", default="full")
    """Kind of the new checkpoint: full holds everything, bridge only what was trained."""


def run(settings: ConvertSettings) -> None:
    """Write MODEL as a checkpoint of the other kind."""
    check_checkpoint(settings.model)
    check_new_folder(Path(settings.out))

    from blipren.training.hub.convert import convert_checkpoint

    print(f"convert: {settings.model} -> {settings.out} ({settings.to} checkpoint)")
    convert_checkpoint(settings.model, Path(settings.out), settings.to)
    print(f"the {settings.to} checkpoint is in {settings.out}")
