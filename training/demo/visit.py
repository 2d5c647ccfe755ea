"""What one visitor of the demo has and may ask for, and the files that a visitor uploads."""

from __future__ import annotations

import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from blipren.training.data.sources.images import ImageError, decode_image, read_file
from blipren.training.demo.talk import Talk
from blipren.training.errors import UserError
from blipren.video_blipren import VideoError, read_frames


@dataclass(frozen=True)
class Limits:
    """What a visitor may ask for.

    Attributes:
        pixels: of a picture. pictures: of a conversation, clips among them. seconds: time of an answer. tokens: of an
            answer.
    """

    pixels: int = 50_000_000
    pictures: int = 8
    seconds: float = 120.0
    tokens: int = 256


@dataclass
class Visit:
    """One visitor's conversations with the models of the page.

    Attributes:
        talks: with each model. shown: messages about each, in the form of `gradio.Chatbot`.
    """

    talks: list[Talk]
    shown: list[list[dict]] = field(default_factory=list)

    def __post_init__(self):
        self.shown = [[] for _ in self.talks]

    def say(self, role: str, *contents) -> None:
        """Add messages to what is shown of each model."""
        for messages in self.shown:
            messages += [{"role": role, "content": content} for content in contents]

    def check(self, pictures: Sequence[Image.Image | list[Image.Image]], limits: Limits) -> None:
        """Check that pictures can be added to the conversation.

        Raises:
            UserError: there is none, or there are too many.
        """
        held = len(self.talks[0].images) + len(pictures)
        if held == 0:
            raise UserError("Add a picture first: drop it on the text box, paste it, or press the clip.")
        if held > limits.pictures:
            raise UserError(f"A conversation has at most {limits.pictures} pictures: begin a new one.")


def read_uploads(
    paths: Sequence[str], limits: Limits, frames: int | None = None
) -> list[Image.Image | list[Image.Image]]:
    """Return the pictures of uploaded files, and the sampled frames of clips.

    Args:
        frames: of a clip; None for a model that takes none.

    Raises:
        UserError: one is no picture, or too large. The message names the file as the visitor does, without its folder.
    """
    pictures: list[Image.Image | list[Image.Image]] = []
    for path in map(Path, paths):
        try:
            if frames is not None and is_clip(path.name):
                pictures.append(read_frames(path, frames))
            else:
                pictures.append(decode_image(read_file(path), max_pixels=limits.pixels))
        except (ImageError, VideoError) as error:
            raise UserError(f"{path.name} cannot be used ({error.reason}): {error.detail}.") from error
    return pictures


def is_clip(name: str) -> bool:
    """Return whether a file is read as a clip, by its name: videos and GIFs."""
    kind = mimetypes.guess_type(name)[0] or ""
    return kind.startswith("video/") or kind == "image/gif"
