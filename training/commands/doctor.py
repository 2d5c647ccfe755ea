"""Prove that a checkpoint's parts work together, before training."""

from dataclasses import dataclass

from blipren.training.settings import Settings, positional


@dataclass(kw_only=True)
class DoctorSettings(Settings):
    """`blipren doctor`: proves that a checkpoint's parts work together, before training."""

    model: str = positional()
    """Checkpoint folder or Hub id."""
    steps: int = 120
    """Most optimizer updates of the eight-image overfitting test."""
    learning_rate: float = 2e-3
    """Learning rate of the eight-image overfitting test."""
    seed: int = 0
    """Seed of the eight drawn images and of the overfitting test."""


def run(settings: DoctorSettings) -> int | None:
    """Run the command. Returns the exit status."""
    from blipren.training.doctor.checks import doctor

    return doctor(settings)
