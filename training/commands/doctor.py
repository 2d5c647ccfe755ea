"""Check that a checkpoint's parts work together, before training."""

from dataclasses import dataclass

from blipren.training.arguments import check_checkpoint
from blipren.training.errors import UsageError
from blipren.training.settings import Settings, positional


@dataclass(kw_only=True)
class OverfittingSettings(Settings):
    """Overfitting test on eight drawn images."""

    steps: int = 120
    """Most optimizer updates, at least 10."""
    learning_rate: float = 2e-3
    """Learning rate."""
    seed: int = 0
    """Seed of the drawn images and of the test."""


@dataclass(kw_only=True)
class DoctorSettings(OverfittingSettings):
    """`blipren doctor`: checks that a checkpoint's parts work together, before training."""

    model: str = positional()
    """Checkpoint folder or Hub id."""

    def __post_init__(self):
        super().__post_init__()
        if self.steps < 10:
            raise UsageError(
                f"steps is {self.steps}; it must be at least 10: the test looks at the loss every 10 steps"
            )


def run(settings: DoctorSettings) -> int:
    """Run every check and print a line per check. Return 1 when one failed."""
    check_checkpoint(settings.model)

    import torch

    from blipren.training.doctor.checks import CHECKS, ModelUnderTest, draw_test_images, run_checks
    from blipren.training.engine.loading import load_checkpoint

    print(f"doctor: {settings.model}: {len(CHECKS)} checks; the last one trains on drawn images and is undone")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # half precision on a CPU is slow, and too coarse for overfitting
    keywords = {"dtype": torch.float32} if device == "cpu" else {}
    model, processor = load_checkpoint(settings.model, **keywords)
    images, captions = draw_test_images(settings.seed)
    results = run_checks(ModelUnderTest(model.to(device), processor, settings, images, captions))
    failed = [result.name for result in results if not result.passed]
    if failed:
        print(f"{settings.model}: {len(failed)} of {len(results)} checks failed: {', '.join(failed)}")
        return 1
    print(f"{settings.model}: all {len(results)} checks passed. Next: blipren embed {settings.model} DATASET CACHE")
    return 0
