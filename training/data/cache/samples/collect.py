"""The distinct images of a data set of conversations, as rows that are embedded like any others."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from blipren.training.data.cache.views import can_be_mirrored
from blipren.training.data.sources.boxes import place_columns
from blipren.training.data.sources.conversations import Conversation, ConversationError
from blipren.training.data.sources.images import ImageError, content_hash, image_bytes
from blipren.training.data.sources.rows import Row, Source
from blipren.training.data.sources.splits import SPLITS


class SampleImages(Source):
    """The distinct images of a source, each with the captions, boxes and points of all rows that have it.

    The source is read once when this is made, without decoding an image: images are told apart by their content. The
    conversations lie in a temporary file until `samples` reads them. Every row of the source is either a sample, or
    has captions alone, or is in `rejected`.

    Args:
        source: rows, of which some are conversations.
        limit: take only the first rows.
        fit: returns a conversation, perhaps a shorter one. Raises `ConversationError` for one that is too long.
    """

    def __init__(
        self, source: Source, limit: int | None = None, fit: Callable[[Conversation], Conversation] | None = None
    ):
        self.source, self.fit = source, fit
        self.name, self.columns, self.fingerprint = source.name, source.columns, source.fingerprint
        self.features = source.features
        self.rows_read = self.captions_only = 0
        self.rejected: list[dict[str, Any]] = []
        """Lines of `rejected.jsonl`, of the kind `sample`."""
        self.rejected_texts: list[dict[str, Any]] = []
        """Lines for captions, boxes and points beside a conversation about no image or several."""
        self.hashes: list[str] = []
        """Content hash of each image."""
        self._ids: dict[str, None] = {}
        self._places: list[tuple[int, int]] = []  # row of the source and place among its images
        self._splits: list[str | None] = []
        self._shown: list[bool] = []
        self._sided: list[bool] = []
        self._numbers: dict[str, int] = {}
        self._digests: dict[tuple[Any, str], str] = {}  # by file
        self._texts: dict[int, list[Row]] = {}  # rows with captions of an image
        self._records: dict[int, list[dict[str, Any]]] = {}  # boxes and points of an image
        self._spool = tempfile.TemporaryFile("w+", encoding="utf-8")
        self.num_samples = 0
        for row in itertools.islice(source.rows(), limit):
            self.rows_read += 1
            self._add(row)
        self.num_rows = len(self.hashes)

    @property
    def has_conversations(self) -> bool:
        return True

    def _reject(self, row: Row, reason: str, value: str) -> None:
        line = {"kind": "sample", "id": row.id, "row": row.index, "reason": reason, "value": value[:500]}
        self.rejected.append(line)

    def _add(self, row: Row) -> None:
        if row.rejected:
            return self._reject(row, *row.rejected)
        has_texts = bool(row.answers or row.problems)
        places = place_columns(row.record or {})
        conversation, error = row.conversation, row.conversation_error
        if conversation is not None and self.fit is not None:
            try:
                conversation = self.fit(conversation)
            except ConversationError as reason:
                conversation, error = None, (reason.reason, reason.detail)
        if conversation is None and not has_texts and not places:
            return self._reject(row, *(error or ("no_text", "no conversation and no caption in its columns")))
        cells = _image_cells(row) if conversation is None else conversation.images
        try:
            digests = [self._digest(row, cell) for cell in cells]
        except ImageError as broken:
            return self._reject(row, broken.reason, broken.detail)
        if (has_texts or places) and len(set(digests)) != 1:
            if conversation is None:
                return self._reject(row, "several_images", f"a caption of {len(digests)} images")
            for text in [*row.answers, *(["boxes or points"] if places else [])]:
                line = {"kind": "text", "id": row.id, "row": row.index, "reason": "several_images"}
                self.rejected_texts.append(line | {"value": str(len(digests)), "text": text[:200]})
            has_texts, places = False, {}
        images = [self._number(row, place, cell, digest) for place, (cell, digest) in enumerate(zip(cells, digests))]
        if places:
            self._records.setdefault(images[0], []).append(places)
        if has_texts:
            row.image = row._data = row.conversation = row.record = None
            row.merged_records = []
            self._texts.setdefault(images[0], []).append(row)
        if conversation is None:
            if error:
                self._reject(row, *error)
            else:
                self.captions_only += 1
            return None
        sided = not can_be_mirrored(conversation.texts())
        for image in images:
            self._shown[image] = True
            self._sided[image] |= sided
        sample = {
            "id": row.id,
            "row": row.index,
            "split": row.split,
            "images": images,
            "messages": json.dumps(conversation.messages, ensure_ascii=False),
            "rejected": conversation.rejected,
        }
        self._spool.write(json.dumps(sample, ensure_ascii=False) + "\n")
        self.num_samples += 1
        return None

    def _digest(self, row: Row, cell: Any) -> str:
        """Return the content hash of an image; a file is read once. Raises `ImageError` where it cannot be read."""
        path = _path_of(cell)
        if path is None:
            return content_hash(image_bytes(cell, row.folder))
        if (row.folder, path) not in self._digests:
            self._digests[row.folder, path] = content_hash(image_bytes(cell, row.folder))
        return self._digests[row.folder, path]

    def _number(self, row: Row, place: int, cell: Any, digest: str) -> int:
        """Return the number of an image."""
        number = self._numbers.setdefault(digest, len(self.hashes))
        if number == len(self.hashes):
            self.hashes.append(digest)
            self._places.append((row.index, place))
            self._splits.append(row.split)
            self._shown.append(False)
            self._sided.append(False)
            name = _path_of(cell) or (f"{row.id}/{place}" if place else row.id)
            name = name if name not in self._ids else f"{name}#{digest[:8]}"
            self._ids[name] = None
        elif row.split is not None:  # the one that holds it out of training wins
            self._splits[number] = max(row.split, self._splits[number] or "train", key=SPLITS.index)
        return number

    @property
    def ids(self) -> list[str]:
        """Ids of the images."""
        return list(self._ids)

    def samples(self) -> Iterator[dict[str, Any]]:
        """Yield the samples in their order: id, row, split (if the data set says it), image numbers, messages, rejected."""
        self._spool.seek(0)
        yield from map(json.loads, self._spool)

    def rows(self, start: int = 0) -> Iterator[Row]:
        if start >= len(self._places):
            return
        ids, number = self.ids, start
        for row in self.source.rows(self._places[start][0]):
            while number < len(self._places) and self._places[number][0] == row.index:
                cells = row.conversation.images if row.conversation is not None else _image_cells(row)
                texts, records = self._texts.get(number, []), self._records.get(number, [])
                yield Row(
                    id=ids[number],
                    index=number,
                    image=cells[self._places[number][1]],
                    folder=row.folder,
                    split=self._splits[number],
                    prompts=[prompt for own in texts for prompt in own.prompts],
                    answers=[answer for own in texts for answer in own.answers],
                    problems=[problem for own in texts for problem in own.problems],
                    shown=self._shown[number],
                    can_be_mirrored=not self._sided[number],
                    record=records[0] if records else None,
                    merged_records=records[1:],
                )
                number += 1
            if number == len(self._places):
                return

    def describe(self) -> str:
        return f"{self.source.describe()}: {self.num_samples:,} conversations about {self.num_rows:,} images"


def _path_of(cell: Any) -> str | None:
    """Return the path of an image cell without bytes."""
    path = cell.get("path") if isinstance(cell, dict) and cell.get("bytes") is None else cell
    return path if isinstance(path, str) and path else None


def _image_cells(row: Row) -> list[Any]:
    """Return the image cells of a row with captions alone."""
    cells = row.image if isinstance(row.image, (list, tuple)) else [row.image]
    return [cell for cell in cells if cell is not None] or [None]


def limit_tokens(processor: Any, max_tokens: int, cut: bool, num_visual_tokens: int) -> Callable:
    """Return the function that fits a conversation into `max_tokens`, images included.

    Args:
        cut: leave out last turns of one that is longer; one whose first answer is beyond the limit is refused anyway.
        num_visual_tokens: tokens of an image.
    """

    def length(messages: list[dict[str, Any]]) -> int:
        images = sum(part["type"] == "image" for turn in messages for part in turn["content"])
        prompt = processor.encode_conversation(messages[:-1], [num_visual_tokens] * images)
        return len(prompt) + len(processor.encode_answer("".join(part["text"] for part in messages[-1]["content"])))

    def fit(conversation: Conversation) -> Conversation:
        messages = conversation.messages
        first = length(messages)
        shortest = 3 if messages[0]["role"] == "system" else 2
        while cut and conversation.rejected is None and len(messages) > shortest and length(messages) > max_tokens:
            messages = messages[:-2]
        if length(messages) > max_tokens:
            raise ConversationError("max_tokens", f"{first} tokens")
        images = sum(part["type"] == "image" for turn in messages for part in turn["content"])
        return Conversation(messages, conversation.images[:images], conversation.rejected, conversation.choices)

    return fit
