"""Publish a checkpoint on the Hub."""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from blipren.training.arguments import check_cache_folder, check_checkpoint, check_evaluation
from blipren.training.errors import UsageError, UserError
from blipren.training.settings import Settings, positional


@dataclass(kw_only=True)
class CardSettings(Settings):
    """Model card."""

    run: str | None = None
    """Run folder with settings, curves and environment; by default MODEL itself."""
    evaluation: str | None = None
    """Folder of `blipren evaluate`: metrics, limits and samples."""
    cache: str | None = None
    """Feature cache that was trained on: data and filter counts."""
    pictures: bool = True
    """Publish curves and the sample grid. Say --no-pictures where the photographs must not be passed on."""
    license: str | None = None
    """Licence of the published weights, as the Hub names it; by default the strictest of the parts."""
    vision_license: str | None = None
    """Licence of the vision encoder, where its own card does not say it."""
    llm_license: str | None = None
    """Licence of the language model, where its own card does not say it."""


@dataclass(kw_only=True)
class UploadSettings(Settings):
    """Upload."""

    private: bool = False
    """Make the repository private when it is created."""
    revision: str = "main"
    """Branch that receives the files once they are verified."""
    tag: str | None = None
    """Tag of the published commit, such as v1."""
    attempts: int = 3
    """Times that a failing Hub is tried before giving up; running the command again continues from there."""

    def __post_init__(self):
        super().__post_init__()
        if self.attempts < 1:
            raise UsageError(f"attempts is {self.attempts}; it must be at least 1")
        if self.revision.startswith("refs/"):
            raise UsageError(f"revision is {self.revision!r}; it must be the name of a branch")


@dataclass(kw_only=True)
class PushSettings(CardSettings, UploadSettings):
    """`blipren push`: publishes a checkpoint on the Hub."""

    model: str = positional()
    """Checkpoint folder."""
    repo: str = positional()
    """Hub repository: user/name."""
    bridge: bool = False
    """Publish only what was trained, and not a full checkpoint; others load the bases from the Hub. Refused where a
    base is a local folder."""
    space: bool = False
    """Also publish the demo as a Space with the same name, pinned to the published commit (needs blipren[demo])."""
    dry_run: bool = False
    """Print the files with their sizes, and send nothing."""

    def __post_init__(self):
        super().__post_init__()
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo):
            raise UsageError(f"repo is {self.repo!r}; it must be user/name")


def run(settings: PushSettings) -> None:
    """Publish MODEL as REPO, or print what would be sent."""
    if not Path(settings.model).is_dir():
        raise UserError(
            f"{settings.model} is not a folder: push takes a checkpoint folder, as `blipren train` leaves it"
        )
    check_checkpoint(settings.model)
    if settings.space and find_spec("gradio") is None:
        raise UserError("the Space is pinned to the Gradio that is installed here: pip install blipren[demo]")
    if settings.evaluation is not None:
        check_evaluation(settings.evaluation)
    if settings.cache is not None:
        check_cache_folder(Path(settings.cache))

    from blipren.training.hub.publish import publish

    publish(settings)
