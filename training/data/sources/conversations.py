"""Conversations of a data set, in one form whatever form it has.

Read are `messages` (role/content, content a text or typed parts), LLaVA's `conversations` (from/value), `texts` with
`images` (the_cauldron, FineVision), TRL's `prompt`/`completion` and `prompt`/`chosen`/`rejected`, and questions with
`choices`. Images stand in a column of their own (one or a list), or in the typed parts.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

IMAGE = "<image>"
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class ConversationError(Exception):
    """A conversation that cannot be used. `reason` is a short word that is counted, `detail` says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass
class Conversation:
    """A conversation and its images, undecoded.

    Attributes:
        messages: `{"role", "content"}` with content a list of `{"type": "text", "text"}` and `{"type": "image"}`.
            A system message may be first; then user and assistant take turns, and the assistant has the last one.
        images: what the image parts show, in their order.
        rejected: another answer to the last user turn, which is worse than the one in `messages`.
        choices: the answers among which a question lets choose.
    """

    messages: list[dict[str, Any]]
    images: list[Any] = field(default_factory=list)
    rejected: str | None = None
    choices: list[str] | None = None

    def texts(self) -> list[str]:
        """Return all texts of the conversation."""
        found = [part["text"] for turn in self.messages for part in turn["content"] if part["type"] == "text"]
        return found + ([self.rejected] if self.rejected is not None else [])


@dataclass
class ConversationColumns:
    """Names of the columns that hold a conversation. None: the data set has no such column."""

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    question: str | None = None
    answer: str | None = None
    choices: str | None = None
    images: str | None = None

    def names(self) -> list[str]:
        """Return the names of the columns that there are."""
        return [name for name in vars(self).values() if name]

    def describe(self) -> str:
        """Return the columns as `, messages=NAME, ...`."""
        return "".join(f", {key}={name}" for key, name in vars(self).items() if name)


def find_conversation_columns(known: set[str]) -> ConversationColumns | None:
    """Return the columns of conversations, known by name, or None where the data set has none."""
    found = ConversationColumns()
    if message_column := next((name for name in ("messages", "conversations") if name in known), None):
        found.messages = message_column
    elif {"texts", "images"} <= known:
        found.messages = "texts"
    elif {"chosen", "rejected"} <= known:
        found.prompt, found.chosen, found.rejected = "prompt" if "prompt" in known else None, "chosen", "rejected"
    elif {"prompt", "completion"} <= known:
        found.prompt, found.completion = "prompt", "completion"
    elif {"question", "choices", "answer"} <= known:
        found.question, found.choices, found.answer = "question", "choices", "answer"
    else:
        return None
    found.images = "images" if "images" in known else None
    return found


def read_conversation(record: dict[str, Any], columns: ConversationColumns, image: Any) -> Conversation | None:
    """Return the conversation of a record, or None where its columns are empty.

    Args:
        record: values by column.
        image: its image or images, where they have no column of lists.

    Raises:
        ConversationError: it cannot be used.
    """
    value = {key: record.get(name) for key, name in vars(columns).items() if name}
    given = _list(value["images"] if columns.images else image)
    rejected = choices = None
    if columns.messages:
        turns = _turns(value["messages"])
        if turns is None:
            return None
    elif columns.choices:
        if value["question"] is None:
            return None
        turns, choices = _choice_turns(value["question"], value["choices"], value["answer"])
    elif columns.chosen:
        if value["chosen"] is None and value["rejected"] is None:
            return None
        prompt = _turns(value.get("prompt"), "user") or []
        chosen, worse = _turns(value["chosen"], "assistant") or [], _turns(value["rejected"], "assistant") or []
        turns, other = _without_repeated(prompt, chosen), _without_repeated(prompt, worse)
        if turns[:-1] != other[:-1] or not turns:
            raise ConversationError("pair", "chosen and rejected must be two answers to the same prompt")
        rejected = _rejected_text(other[-1])
        if rejected == _rejected_text(turns[-1]):
            raise ConversationError("pair", f"chosen and rejected are the same: {rejected[:80]!r}")
    else:
        if value["prompt"] is None and value["completion"] is None:
            return None
        turns = (_turns(value["prompt"], "user") or []) + (_turns(value["completion"], "assistant") or [])
    messages, images = _place_images(turns, given)
    _check_turns(messages)
    return Conversation(messages, images, rejected, choices)


def _list(value: Any) -> list[Any]:
    """Return the images of a cell: none, one, or a list of them."""
    if value is None:
        return []
    return [image for image in value if image is not None] if isinstance(value, (list, tuple)) else [value]


def _turns(value: Any, role: str = "user") -> list[dict[str, Any]] | None:
    """Return the turns of a cell as `role` and `content` (None: the cell is empty).

    Args:
        role: of a plain text.
    """
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except ValueError:
            pass  # a text that begins with a bracket
    if value is None:
        return None
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, (list, tuple)) or not all(isinstance(turn, dict) for turn in value):
        raise ConversationError("turns", f"a conversation is a list of turns, not {type(value).__name__}")
    turns = []
    for turn in value:
        if "role" in turn or "from" in turn:
            role = turn.get("role", turn.get("from"))
            content = turn.get("content", turn.get("value"))
            trace = turn.get("reasoning_content") or turn.get("thinking")
            if isinstance(content, str) and isinstance(trace, str) and trace.strip():
                content = f"<think>\n{trace.strip()}\n</think>\n\n{content}"
            turns.append({"role": _ROLES.get(role, role), "content": content})
        elif "user" in turn and "assistant" in turn:
            turns += [{"role": "user", "content": turn["user"]}, {"role": "assistant", "content": turn["assistant"]}]
        else:
            raise ConversationError("turns", f"a turn has the keys {sorted(turn)}, not role and content")
    return turns


def _without_repeated(prompt: list[dict], answer: list[dict]) -> list[dict]:
    """Return prompt and answer as one conversation, where the answer may repeat the prompt."""
    return answer if prompt and answer[: len(prompt)] == prompt else prompt + answer


def _rejected_text(turn: dict[str, Any]) -> str:
    text = _text_of(turn["content"])
    if turn["role"] != "assistant" or not text:
        raise ConversationError("pair", "chosen and rejected must end in an answer of the assistant")
    return text


def _text_of(content: Any) -> str:
    parts = content if isinstance(content, (list, tuple)) else [{"text": content}]
    return "".join(part.get("text") or "" for part in parts).strip()


def _choice_turns(question: str, choices: Any, answer: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Return question and answer with the choices in the prompt, and the choices.

    Args:
        answer: number of the right choice, its letter, or its text.
    """
    choices = [str(choice).strip() for choice in (choices.tolist() if hasattr(choices, "tolist") else choices or [])]
    if len(choices) < 2 or len(choices) > len(LETTERS) or len(set(choices)) < len(choices):
        raise ConversationError("choices", f"a question needs two or more different choices, not {choices}")
    if isinstance(answer, str) and answer.strip() in choices:
        right = choices.index(answer.strip())
    elif isinstance(answer, str) and answer.strip() in LETTERS[: len(choices)] and answer.strip():
        right = LETTERS.index(answer.strip())
    elif isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        right = answer
    else:
        raise ConversationError("choices", f"the answer {answer!r} is none of the {len(choices)} choices")
    return [
        {"role": "user", "content": choice_prompt(str(question), choices)},
        {"role": "assistant", "content": LETTERS[right]},
    ], choices


def choice_prompt(question: str, choices: list[str]) -> str:
    """Return the prompt of a multiple-choice question, in LLaVA's wording."""
    lines = [question.strip(), *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices))]
    return "\n".join([*lines, "Answer with the option's letter from the given choices directly."])


def _place_images(turns: list[dict[str, Any]], given: list[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Return turns with typed parts, and the images in the order of their parts.

    Images stand where the text says `<image>` or a typed part is. Where neither is anywhere, they stand in front of the
    first user turn, as TRL has it. A placeholder at an end of a text, with or without a line break, is moved in front of
    it, as LLaVA does: the prompt of one image is the same wherever the data set wrote it.
    """
    messages, own, typed = [], [], 0
    for turn in turns:
        content, parts = turn["content"], []
        if isinstance(content, (list, tuple)):
            for part in content:
                kind = part.get("type")
                if kind in ("image", "image_url"):
                    typed += 1
                    cell = part.get("image") or part.get("path") or part.get("url") or part.get("image_url")
                    own += [cell.get("url") if isinstance(cell, dict) and "url" in cell else cell] if cell else []
                    parts.append({"type": "image"})
                elif kind == "text":
                    parts.append({"type": "text", "text": part.get("text") or ""})
                else:
                    raise ConversationError("part", f"a message has a part of type {kind!r}; read are text and image")
        elif isinstance(content, str):
            parts = _parts(content) if turn["role"] == "user" and given else [{"type": "text", "text": content}]
        elif content is not None:
            raise ConversationError("turns", f"the content of a turn is {type(content).__name__}, not a text")
        messages.append({"role": turn["role"], "content": parts})
    placed = sum(part["type"] == "image" for turn in messages for part in turn["content"])
    images = own or given
    first = next((turn for turn in messages if turn["role"] == "user"), None)
    if not placed and images and first:
        first["content"][:0] = [{"type": "image"}] * len(images)
        placed = len(images)
    if not given and not typed:
        for turn in messages:
            for part in turn["content"]:
                if re.search(rf"^\s*{IMAGE}|{IMAGE}\s*$", part.get("text", "")):
                    raise ConversationError(
                        "image_missing", f"a text speaks of an image that is not there: {part}"[:200]
                    )
    if placed != len(images):
        reason = "image_missing" if placed > len(images) else "image_not_mentioned"
        raise ConversationError(reason, f"the texts speak of {placed} images, and {len(images)} are there")
    for turn in messages:
        for part in turn["content"]:
            if part["type"] == "image" and turn["role"] != "user":
                raise ConversationError("image_in_answer", f"an image stands in a turn of the role {turn['role']}")
        _strip_texts(turn)
    return messages, images


def _strip_texts(turn: dict[str, Any]) -> None:
    """Remove white space at the ends of a turn, also between its text and images at its ends, and empty texts."""
    texts = [part for part in turn["content"] if part["type"] == "text" and part["text"].strip()]
    if texts:
        texts[0]["text"] = texts[0]["text"].lstrip()
        texts[-1]["text"] = texts[-1]["text"].rstrip()
    turn["content"] = [part for part in turn["content"] if part["type"] == "image" or part in texts]


def _parts(text: str) -> list[dict[str, Any]]:
    """Return the parts of a text with `<image>` in it."""
    pieces = text.split(IMAGE)
    count = len(pieces) - 1
    body = [piece for piece in pieces if piece.strip()]
    if count and len(body) <= 1 and not (pieces[0].strip() and pieces[-1].strip()):  # at the ends of one text
        return [{"type": "image"}] * count + [{"type": "text", "text": piece} for piece in body]
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        parts += [{"type": "image"}] if number else []
        parts.append({"type": "text", "text": piece})
    return parts


def _check_turns(messages: list[dict[str, Any]]) -> None:
    """Raise `ConversationError` for roles out of order and empty turns."""
    roles = [turn["role"] for turn in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise ConversationError(
            "roles", f"user and assistant must take turns, the assistant last: {', '.join(map(str, roles))[:200]}"
        )
    for number, turn in enumerate(messages):
        if not turn["content"] or (turn["role"] != "user" and not _text_of(turn["content"])):
            raise ConversationError("empty_turn", f"turn {number} ({turn['role']}) has no text")
