"""Convert between bridge and full checkpoints."""

from dataclasses import dataclass

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


def run(settings: ConvertSettings) -> int | None:
    """Run the command. Returns the exit status."""
    from blipren.training.hub.convert import convert

    return convert(settings)
