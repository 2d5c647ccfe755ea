"""Which columns of a data set hold what, and how their values are read.

A column name may be nested (`json.caption`) and may give alternatives in order of preference
(`short_caption/caption`: the first one that holds text). Lists of texts, and of objects with a text inside, count as
several captions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from blipren.training.data.sources.conversations import ConversationColumns, find_conversation_columns
from blipren.training.errors import UserError

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "file_name", "image_path", "image_file")
VIDEO_COLUMNS = ("video", "mp4", "webm", "mov", "mkv", "avi", "clip", "video_path", "video_file")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".gif")
CAPTION_COLUMNS = ("captions", "caption", "sentences", "text", "txt", "json.caption")
ID_COLUMNS = ("id", "__key__", "key", "file_name")
_TEXT_KEYS = ("raw", "caption", "text", "answer", "value")


def get(record: dict[str, Any], name: str) -> Any:
    """Return the value of a column, or None; `json.caption` is `record["json"]["caption"]`."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if isinstance(value, str) and value[:1] == "{":
            try:
                value = json.loads(value)
            except ValueError:
                return None
        if isinstance(value, bytes) and value[:1] == b"{":
            try:
                value = json.loads(value)
            except ValueError:
                return None
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


def texts(value: Any) -> list[Any]:
    """Return a text, a list of texts or a list of objects that hold a text as a flat list. Other values are kept."""
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in (texts(item) if isinstance(item, (list, tuple, dict)) else [item])]
    if isinstance(value, dict):
        for key in _TEXT_KEYS:
            if key in value:
                return texts(value[key])
        return [None]
    if isinstance(value, bytes):
        return [value.decode("utf-8", "replace")]
    if hasattr(value, "tolist"):
        return texts(value.tolist())
    return [value]


@dataclass
class Columns:
    """Names of the columns that are read. None or empty: the data set has no such column."""

    image: str
    """Empty where a data set of conversations has no column of single images. It holds videos if `video` is set."""
    captions: list[str] = field(default_factory=list)
    question: str | None = None
    answer: str | None = None
    id: str | None = None
    split: str | None = None
    status: str | None = None
    conversation: ConversationColumns | None = None
    video: bool = False

    def wanted(self) -> set[str]:
        """Return the top-level names of all columns that are read."""
        names = [self.image, self.question, self.answer, self.id, self.split, self.status]
        names += self.conversation.names() if self.conversation else []
        names += [choice for column in self.captions for choice in column.split("/")]
        names += ["error_message"] if self.status else []
        return {name for full in names if full for name in (full, full.split(".")[0])}

    def describe(self) -> str:
        """Return the columns as `image=NAME, captions=NAMES, ...`."""
        parts = [f"{'video' if self.video else 'image'}={self.image}"]
        for name in ("captions", "question", "answer", "id", "split", "status"):
            value = getattr(self, name)
            if value:
                parts.append(f"{name}={' '.join(value) if isinstance(value, list) else value}")
        return ", ".join(parts) + (self.conversation.describe() if self.conversation else "")


def find_columns(
    names: Sequence[str],
    nested: dict[str, Sequence[str]] | None = None,
    *,
    dataset: str,
    image_column: str | None = None,
    caption_columns: Sequence[str] | None = None,
    question_column: str | None = None,
    answer_column: str | None = None,
    id_column: str | None = None,
    split_column: str | None = None,
    status_column: str | None = None,
    image_features: Sequence[str] = (),
    text_required: bool = True,
) -> Columns:
    """Find the columns to read: those given, else those known by name.

    Args:
        names: top-level columns.
        nested: keys inside the columns that hold objects.
        image_features: columns that the data set declares as images.
        text_required: raise when there is no column of captions, questions or conversations.

    Raises:
        UserError: a column is not there; the message lists those that are.
    """
    known = set(names) | {f"{outer}.{inner}" for outer, inners in (nested or {}).items() for inner in inners}
    listing = ", ".join(sorted(known)) or "none"

    def given(column: str, option: str) -> str:
        choices = [choice for choice in column.split("/") if choice in known]
        if not choices:
            raise UserError(f"{dataset}: no column {column!r} ({option}); its columns are: {listing}")
        return "/".join(choices)

    if image_column == "image" and "image" not in known and "file_name" in known:
        image = "file_name"  # the name that `datasets` gives to what a folder's metadata calls file_name
    elif image_column:
        image = given(image_column, "--image-column")
    else:
        image = next((name for name in IMAGE_COLUMNS if name in known), None) or next(iter(image_features), None)
        if image in (None, "file_name"):  # the name of a folder's file says nothing, see MetadataFolder
            image = next((name for name in VIDEO_COLUMNS if name in known), image)
    conversation = None
    if not (caption_columns or question_column):
        conversation = find_conversation_columns(known)
    if image is None:
        if conversation is None:
            raise UserError(f"{dataset}: no image column found; name it by --image-column. Its columns are: {listing}")
        image = ""
    columns = Columns(image=image, conversation=conversation, video=image in VIDEO_COLUMNS)
    numbered = sorted(
        (name for name in known if name.startswith("caption_") and name[8:].isdigit()), key=lambda name: int(name[8:])
    )
    if caption_columns:
        columns.captions = [given(column, "--caption-columns") for column in caption_columns]
    elif "prompts" in known and "answers" in known:
        columns.question, columns.answer = "prompts", "answers"
    elif numbered:
        columns.captions = numbered
    elif "short_caption" in known:
        columns.captions = ["short_caption/caption" if "caption" in known else "short_caption"]
    elif not question_column:
        # beside conversations, `text` is most often the same again
        names = CAPTION_COLUMNS if conversation is None else CAPTION_COLUMNS[:2] if image else ()
        columns.captions = [name for name in names if name in known][:1]
    if question_column:
        columns.question = given(question_column, "--question-column")
    elif columns.question is None and not caption_columns and not (conversation and conversation.choices):
        columns.question = next((name for name in ("questions", "question") if name in known), None)
    if answer_column:
        columns.answer = given(answer_column, "--answer-column")
    elif columns.question and columns.answer is None:
        columns.answer = next(
            (name for name in ("answers", "answer", "multiple_choice_answer") if name in known), None
        )
    if columns.question and not columns.answer:
        raise UserError(
            f"{dataset}: question column {columns.question!r} has no answer column; name it by --answer-column. "
            f"Its columns are: {listing}"
        )
    if text_required and not (columns.captions or columns.question or columns.conversation):
        raise UserError(
            f"{dataset}: no column with captions found; name one or more by --caption-columns. "
            f"Its columns are: {listing}"
        )
    columns.id = given(id_column, "--id-column") if id_column else next((n for n in ID_COLUMNS if n in known), None)
    if split_column:
        columns.split = given(split_column, "--split-column")
    else:
        columns.split = "split" if "split" in known else None
    if status_column:
        columns.status = given(status_column, "--status-column")
    else:  # img2dataset's, known by the columns beside it
        for prefix in ("", "json."):
            if f"{prefix}status" in known and known & {f"{prefix}error_message", f"{prefix}key"}:
                columns.status = f"{prefix}status"
                break
    return columns


def read_texts(record: dict[str, Any], columns: Columns) -> tuple[list[str | None], list[Any], list[tuple[str, str]]]:
    """Return prompts, answers and problems of one row. The prompt of a caption is None.

    Answers are the data's, stripped. What is no text (None, a number, empty) is a problem `(rule, value)` instead.
    """
    prompts: list[str | None] = []
    answers: list[str] = []
    problems: list[tuple[str, str]] = []

    def add(prompt: Any, answer: Any) -> None:
        if isinstance(answer, (int, float)) and not isinstance(answer, bool) and prompt is not None:
            answer = f"{answer:g}" if isinstance(answer, float) else str(answer)  # "How many?" 3
        if isinstance(answer, bool) and prompt is not None:
            answer = "yes" if answer else "no"
        if prompt is not None and (not isinstance(prompt, str) or not prompt.strip()):
            problems.append(("question_empty", repr(prompt)[:200]))
        elif not isinstance(answer, str):
            problems.append(("no_text", f"{type(answer).__name__} {answer!r}"[:200]))
        elif not answer.strip():
            problems.append(("empty", repr(answer)[:200]))
        else:
            prompts.append(None if prompt is None else prompt.strip())
            answers.append(answer.strip())

    for column in columns.captions:
        values: list[Any] = [None]
        for choice in column.split("/"):
            values = texts(get(record, choice))
            if any(isinstance(value, str) and value.strip() for value in values):
                break
        for value in values:
            add(None, value)
    if columns.question and columns.answer:
        raw_questions, raw_answers = get(record, columns.question), get(record, columns.answer)
        answer_list = texts(raw_answers)
        if isinstance(raw_questions, (list, tuple)) or hasattr(raw_questions, "tolist"):
            question_list = [None if q is None else texts(q)[0] for q in raw_questions]
            if len(question_list) != len(answer_list):
                problems.append(("question_count", f"{len(question_list)} questions, {len(answer_list)} answers"))
                question_list, answer_list = [], []
        else:
            question_list = [raw_questions] * len(answer_list)
            if raw_questions is None and columns.question != "prompts":
                question_list = [""] * len(answer_list)
        for question, answer in zip(question_list, answer_list):
            add(question, answer)
    return prompts, answers, problems
