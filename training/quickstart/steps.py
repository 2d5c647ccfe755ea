"""What the runs of all drawn worlds share: the committed towers, and the steps, which are commands of `blipren`."""

import dataclasses
from pathlib import Path

from blipren.training.cli import build_settings, run_command
from blipren.training.errors import UserError

TOWERS = Path(__file__).parent / "towers"


def run_step(command: str, recipe: str = "quickstart", **values) -> None:
    """Run a `blipren` command as the command line does: with its section of a recipe and these values over it.

    Raises:
        UserError: the command failed.
    """
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    settings = build_settings(command, flags, recipe)
    shown = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.name in flags}
    print(f"\n== blipren {command} {' '.join(f'{k}={v}' for k, v in shown.items())}", flush=True)
    status = run_command(command, settings)
    if status:
        raise UserError(f"blipren {command} failed with exit status {status}; its messages are above")


def export_model(run: Path, model: Path) -> None:
    """Save the trained bridge with its frozen parts as one full checkpoint."""
    from blipren import BliprenForConditionalGeneration, BliprenProcessor

    BliprenForConditionalGeneration.from_pretrained(run).save_pretrained(model)
    BliprenProcessor.from_pretrained(run).save_pretrained(model)
