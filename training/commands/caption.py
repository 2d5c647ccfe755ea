"""Caption images, or answer a question about them."""

from dataclasses import dataclass
from pathlib import Path

from blipren.training.arguments import check_checkpoint, check_files
from blipren.training.errors import UsageError, UserError
from blipren.training.evaluation.settings import SamplingSettings
from blipren.training.settings import choice, positional


@dataclass(kw_only=True)
class CaptionSettings(SamplingSettings):
    """`blipren caption`: captions for images."""

    model: str = positional()
    """Checkpoint folder or Hub id."""
    images: list[str] = positional()
    """Image files and folders. Folders are searched with their subfolders; files that are no images are reported."""
    follow_links: bool = False
    """Read symbolic links that lead out of a folder."""
    json: bool = False
    """Print one JSON object a line instead of text."""
    csv: str | None = None
    """Also write a table with the columns file and caption."""
    attention: str | None = None
    """Also write a PNG with the attention map of every word, of one image."""
    device: str = choice("auto", "cpu", "cuda", "mps", default="auto")
    """Device to compute on."""

    def __post_init__(self):
        super().__post_init__()
        if self.attention is not None and (len(self.images) != 1 or Path(self.images[0]).is_dir()):
            raise UsageError("attention draws one image: give one image file, or leave out attention")


def run(settings: CaptionSettings) -> int | None:
    """Run the command. Returns the exit status."""
    check_checkpoint(settings.model)
    check_files(*(name for name in settings.images if not Path(name).is_dir()))
    for out in (settings.csv, settings.attention):
        if out is not None and not Path(out).absolute().parent.is_dir():
            raise UserError(f"{out} cannot be written: there is no folder {Path(out).absolute().parent}")

    import json
    import sys
    from collections import Counter

    from blipren.training.data.sources.images import ImageError
    from blipren.training.evaluation.captioning import caption_files, check_named_files, find_files
    from blipren.training.evaluation.generation import load_model
    from blipren.training.evaluation.results import csv_text
    from blipren.training.files import write_atomically

    files = find_files(settings.images)
    check_named_files(files)  # before the model is loaded: a wrong file fails at once
    model, processor = load_model(settings.model, settings.device)
    rows, skipped = [], Counter()
    for file, answer in caption_files(model, processor, files, settings, settings.follow_links):
        if isinstance(answer, ImageError):
            skipped[answer.reason] += 1
            print(f"skipped {file.path} ({answer.reason}): {answer.detail}", file=sys.stderr)
            continue
        rows.append({"file": str(file.path), "caption": answer["text"]})
        if settings.json:
            print(json.dumps({"image": str(file.path), "prompt": settings.prompt, **answer}, ensure_ascii=False))
        else:
            print(answer["text"] if files[0].folder is None and len(files) == 1 else f"{file.path}: {answer['text']}")
    if not rows:
        raise UserError(f"there is no image in {', '.join(settings.images)}")
    if skipped:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(skipped.items()))
        print(
            f"{len(rows):,} images have a caption, {skipped.total():,} files were skipped: {reasons}", file=sys.stderr
        )
    if settings.csv is not None:
        write_atomically(Path(settings.csv), csv_text(rows))
        print(f"captions of {len(rows):,} images are in {settings.csv}", file=sys.stderr)
    if settings.attention is not None:
        from blipren.training.evaluation.attention import explain
        from blipren.training.evaluation.report.pictures import attention_picture

        explained = explain(model, processor, files[0].load(), settings.prompt, rows[0]["caption"])
        attention_picture(Path(settings.attention), explained)
        print(f"the attention maps of {len(explained.words)} words are in {settings.attention}", file=sys.stderr)
