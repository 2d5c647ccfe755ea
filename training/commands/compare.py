"""Compare two evaluations of the same images."""

from dataclasses import dataclass

from blipren.training.arguments import check_evaluation
from blipren.training.settings import Settings, positional


@dataclass(kw_only=True)
class CompareSettings(Settings):
    """`blipren compare`: paired comparison of two evaluation folders."""

    run_a: str = positional()
    """Evaluation folder of the first run."""
    run_b: str = positional()
    """Evaluation folder of the second run."""
    out: str | None = None
    """Folder for compare.json and compare.html; by default RUN_B."""
    resamples: int = 2000
    """Number of samples of the paired bootstrap."""
    images: int = 40
    """Number of images in the page: those whose captions changed most."""
    seed: int = 0
    """Seed of the bootstrap."""


def run(settings: CompareSettings) -> int | None:
    """Run the command. Returns the exit status."""
    check_evaluation(settings.run_a)
    check_evaluation(settings.run_b)

    from blipren.training.evaluation.report.compare import compare

    return compare(settings)
