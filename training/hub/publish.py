"""Publish a checkpoint: which files, with which card, then the upload."""

import tempfile
from dataclasses import replace
from pathlib import Path

from blipren.model_card.build import CardSources, build_card
from blipren.training.checkpoint_config import local_bases, read_config
from blipren.training.commands.push import PushSettings
from blipren.training.errors import UserError
from blipren.training.hub.published_files import (
    PublishedFile,
    check_no_local_path,
    collect_checkpoint_files,
    is_published,
)
from blipren.training.hub.space import space_files
from blipren.training.hub.upload import upload


def publish_run(run: Path, repo: str, private: bool = True) -> str:
    """Publish the finished model in a run folder with its card, as `blipren push` does.

    Returns:
        The id of the published commit.

    Raises:
        UserError: the checkpoint must not or cannot be published, or the Hub refuses or cannot be reached.
    """
    return publish(PushSettings(model=str(run), repo=repo, private=private))


def publish(settings: PushSettings) -> str | None:
    """As [`publish_run`], with all settings of `blipren push`. Returns None for a dry run."""
    with tempfile.TemporaryDirectory(prefix="blipren-push-") as scratch:
        folder = checkpoint_to_publish(Path(settings.model), settings.bridge, Path(scratch))
        files = collect_files(folder, settings)
        print(file_table(files), f"  to {settings.repo} ({settings.revision})", sep="\n")
        if settings.dry_run:
            print("dry run: nothing was sent")
            return None
        commit = upload(files, settings.repo, settings)
    if settings.space:
        space = replace(settings, revision="main", tag=None)  # a Space runs its main branch
        takes_videos = read_config(Path(settings.model)).get("num_frames") is not None
        upload(space_files(settings.repo, commit, takes_videos), settings.repo, space, repo_type="space")
    return commit


def checkpoint_to_publish(model: Path, bridge: bool, scratch: Path) -> Path:
    """Return the checkpoint folder itself where it is of the wanted kind, else a conversion of it in `scratch`."""
    config = read_config(model)
    if bridge:
        for part, base in local_bases(config).items():
            raise UserError(
                f"the bridge needs a {part} model from the local folder {base}, so nobody else could load it: publish a "
                "full checkpoint (without --bridge), or train on a base model from the Hub"
            )
    wanted, found = "bridge" if bridge else "full", config.get("checkpoint_type", "full")
    if found == wanted:
        return model
    from blipren.training.hub.convert import convert_checkpoint  # here: only a conversion needs torch

    print(f"{model} is a {found} checkpoint: converting it to a {wanted} one")
    convert_checkpoint(model, scratch / "checkpoint", wanted)
    return scratch / "checkpoint"


def collect_files(folder: Path, settings: PushSettings) -> list[PublishedFile]:
    """Return the files of the checkpoint, its card, pictures and evaluation results, sorted by name."""
    files = collect_checkpoint_files(folder, read_config(folder))
    sources = CardSources(
        model=folder,
        run=Path(settings.run or settings.model),
        evaluation=Path(settings.evaluation) if settings.evaluation else None,
        cache=Path(settings.cache) if settings.cache else None,
        pictures=settings.pictures,
        tag=settings.tag,
        space=settings.space,
        license=settings.license,
        base_licenses={"vision": settings.vision_license, "llm": settings.llm_license},
    )
    for name, content in build_card(settings.repo, sources).items():
        if not is_published(name):
            raise ValueError(f"the card has a file {name}, which is not among the files that may be published")
        files.append(PublishedFile(name, content))
        check_no_local_path(files[-1])
    return sorted(files, key=lambda file: file.name)


def file_table(files: list[PublishedFile]) -> str:
    """Return a line per file with its size, and their sum."""
    width = max(len(file.name) for file in files)
    lines = [f"  {file.name:<{width}}  {human_size(file.size):>9}" for file in files]
    return "\n".join([*lines, f"  {len(files)} files, {human_size(sum(file.size for file in files))}"])


def human_size(size: float) -> str:
    """Return a number of bytes as a reader wants it: 524.7 KB."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
