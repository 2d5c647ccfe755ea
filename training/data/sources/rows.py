"""One row of a data set, and what every source of rows has in common."""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from blipren.training.data.sources.columns import Columns, get, read_texts
from blipren.training.data.sources.conversations import Conversation, ConversationError, read_conversation
from blipren.training.data.sources.images import (
    Folder,
    ImageError,
    content_hash,
    decode_image,
    hash_file,
    image_bytes,
)
from blipren.training.data.sources.splits import normalize_split
from blipren.training.errors import UserError
from blipren.video_blipren import VideoError, VideoFrames, read_frames

if TYPE_CHECKING:
    from datasets import Features


@dataclass
class Row:
    """One image with its texts, undecoded, or a conversation with any number of images."""

    id: str
    index: int
    """Position in the reading order of the whole source."""
    image: Any
    """Bytes, a path, `{"bytes", "path"}` or a PIL image; `load` makes it RGB pixels."""
    folder: Folder = Folder()
    split: str | None = None
    """`train`, `validation`, `test`, or None where the image's hash decides."""
    prompts: list[str | None] = field(default_factory=list)
    """The prompt of each answer; None is the default caption prompt."""
    answers: list[str] = field(default_factory=list)
    conversation: Conversation | None = None
    """None also where it could not be read."""
    video: bool = False
    """What `image` holds is a video."""
    shown: bool = False
    """A conversation shows the image, which needs no text of its own."""
    can_be_mirrored: bool = True
    """False where a conversation about the image names sides or digits."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """Texts that could not be read: `(rule, value)`."""
    conversation_error: tuple[str, str] | None = None
    """Why the conversation could not be read: `(reason, value)`."""
    rejected: tuple[str, str] | None = None
    """Why the row cannot be used, `(reason, value)`; known before the image is opened."""
    width: int | None = None
    """Pixels of the upright image, known after `load`."""
    height: int | None = None
    seconds: float | None = None
    """Duration of a video, known after `load_frames`."""
    record: dict[str, Any] | None = field(default=None, repr=False)
    """All columns of the data set, where `open_rows` was asked to keep them; images in them are undecoded."""
    merged_records: list[dict[str, Any]] = field(default_factory=list, repr=False)
    """The same of further lines about the image."""
    _data: bytes | Image.Image | None = field(default=None, repr=False)

    def data(self) -> bytes | Image.Image:
        """Return the undecoded image, which is read once. Raises `ImageError`."""
        if self._data is None:
            self._data = image_bytes(self.image, self.folder)
        return self._data

    def load(self) -> Image.Image:
        """Return the upright RGB image, of a video the middle one, and set `width` and `height`. Raises `ImageError`."""
        if self.video:
            return self.load_frames(1)[0]
        image = decode_image(self.data())
        self.width, self.height = image.size
        return image

    def load_frames(self, num_frames: int) -> VideoFrames:
        """Return frames of the video, sampled evenly by time, and set `width`, `height` and `seconds`. Raises `ImageError`."""
        try:
            frames = read_frames(self._video(), num_frames)
        except VideoError as error:
            raise ImageError(error.reason, error.detail) from error
        except ImportError as error:
            raise UserError(str(error)) from error
        (self.width, self.height), self.seconds = frames[0].size, frames.seconds
        return frames

    def _video(self) -> Path | bytes | Image.Image:
        """Return the file of the video, or its bytes where it lies in none. A file of gigabytes is never read whole."""
        value = self.image
        if isinstance(value, dict) and value.get("bytes") is None:
            value = value.get("path")
        if isinstance(value, str) and not (self.folder.remote_prefix and value.startswith(self.folder.remote_prefix)):
            return self.folder.resolve(value)
        return self.data()

    def image_hash(self) -> str:
        """Return 32 hex digits of the image's or video's content, without decoding it. Raises `ImageError`."""
        video = self._video() if self.video else None
        return hash_file(video) if isinstance(video, Path) else content_hash(self.data())


class Source(abc.ABC):
    """Rows in a fixed order. `rows(start)` continues where an earlier reader stopped."""

    name: str
    columns: Columns
    fingerprint: str
    num_rows: int | None = None
    features: Features | None = None
    """Types of the columns of `Row.record`, where the columns are kept."""

    @abc.abstractmethod
    def rows(self, start: int = 0) -> Iterator[Row]:
        """Yield the rows from number `start` on."""

    def __iter__(self) -> Iterator[Row]:
        return self.rows()

    @property
    def has_conversations(self) -> bool:
        """Whether its rows may be conversations."""
        return self.columns.conversation is not None

    def count_rows(self) -> int:
        """Return the number of rows, counted if it is not known."""
        if self.num_rows is None:
            self.num_rows = sum(1 for _ in self.rows())
        return self.num_rows

    def describe(self) -> str:
        """Return name, number of rows and columns as a line."""
        count = "streamed rows" if self.num_rows is None else f"{self.num_rows:,} rows"
        return f"{self.name}: {count}; columns {self.columns.describe()}"


def make_row(record: dict[str, Any], columns: Columns, index: int, default_id: str, folder: Folder) -> Row:
    """Make a row from a record of columns. What is wrong with the record is noted in the row; nothing is raised."""
    prompts, answers, problems = read_texts(record, columns)
    row_id = get(record, columns.id) if columns.id else None
    if columns.id == "__key__" and record.get("__url__"):
        row_id = f"{Path(str(record['__url__'])).stem}/{row_id}"  # two tars may have the same keys
    image = next((v for choice in columns.image.split("/") if (v := get(record, choice)) is not None), None)
    row = Row(
        id=default_id if row_id is None or isinstance(row_id, (dict, list)) else str(row_id),
        index=index,
        image=image,
        folder=folder,
        video=columns.video,
        prompts=prompts,
        answers=answers,
        problems=problems,
    )
    if columns.conversation:
        try:
            row.conversation = read_conversation(record, columns.conversation, image)
        except ConversationError as error:
            row.conversation_error = (error.reason, error.detail)
        if row.conversation or row.conversation_error:  # which needs no caption beside it
            row.problems = [problem for problem in problems if problem[0] != "no_text"]
    status = get(record, columns.status) if columns.status else None
    if isinstance(status, str) and status != "success":
        message = get(record, columns.status.replace("status", "error_message"))
        row.rejected = ("status", f"{status}: {message}" if message else status)
    if columns.split:
        value = get(record, columns.split)
        if value is not None:
            row.split = normalize_split(value)
            if row.split is None:
                row.rejected = row.rejected or ("unknown_split", str(value)[:200])
    return row


def hash_texts(parts: Iterable[str]) -> str:
    """Return 32 hex digits over texts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:32]


def parse_record(line: bytes | str) -> dict[str, Any] | None:
    """Return the JSON object of a line, or None if it is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
