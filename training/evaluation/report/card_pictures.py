"""Pictures of an evaluation for the model card."""

from __future__ import annotations

import contextlib
from pathlib import Path

from blipren.training.data.sources.images import ImageError
from blipren.training.evaluation.attention import explain
from blipren.training.evaluation.report.pictures import attention_picture
from blipren.training.evaluation.results import Evaluation


def write_example(out: Path, result: Evaluation, model, processor, prompt: str | None) -> None:
    """Write the first captioned image that can be read as example.png, and where the model looked as attention.png."""
    for example in result.examples:
        with contextlib.suppress(ImageError):
            if (caption := result.captions.get(example.id, {}).get("text")) and not example.row.video:
                image = example.load()
                attention_picture(out / "attention.png", explain(model, processor, image, prompt, caption))
                image.thumbnail((640, 640))
                image.save(out / "example.png")
                return
