"""Token ids of the answers: a folder for each tokenizer, template and caption filter, beside the features."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa

from blipren.training.data.cache.shards import CacheDamage, as_json, file_checksum, write_dataset_files, write_table
from blipren.training.data.cache.writer.lock import CacheLock
from blipren.training.errors import UserError
from blipren.training.files import write_atomically

if TYPE_CHECKING:
    from blipren.training.data.cache.reader import FeatureCache

FORMAT = 1
COLUMNS = datasets.Features(
    {
        "id": datasets.Value("string"),
        "prompt": datasets.List(datasets.Value("int32")),
        "answer_ids": datasets.List(datasets.List(datasets.Value("int32"))),
    }
)


@dataclass
class TokenTable:
    """Answers of a split as token ids in flat arrays. Image i has the answers `first[i]` to `first[i + 1]`.

    The arrays are memory-mapped files.
    """

    first: np.ndarray
    """`[num_images + 1]`"""
    starts: np.ndarray
    """`[num_answers + 1]`, where each answer begins in `ids`."""
    ids: np.ndarray
    """`[num_tokens]`, each answer with its one end token."""
    prompt_of: np.ndarray
    """`[num_answers]`, index into `prompts`."""
    prompts: list[str | None]
    """Prompts as text; None is the default caption prompt."""
    view_of: np.ndarray | None = None
    """`[num_answers]`, the view that an answer is true of, -1 for all; None where all are true of all views."""

    def __len__(self) -> int:
        return len(self.first) - 1

    def answers(self, image: int, view: int = 0) -> list[tuple[str | None, list[int]]]:
        """Return the `(prompt, answer ids with the end token)` pairs of a view of an image."""
        return [
            (self.prompts[self.prompt_of[a]], self.ids[self.starts[a] : self.starts[a + 1]].tolist())
            for a in range(self.first[image], self.first[image + 1])
            if self.view_of is None or self.view_of[a] in (-1, view)
        ]


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of what a tokenizer does to text: of its backend, or of vocabulary and special tokens of a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.pop("truncation", None)  # set by the latest call
        state.pop("padding", None)
    else:
        state = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()[:32]


def token_fingerprint(processor: Any, captions: Any) -> dict[str, Any]:
    """Return what decides token ids: tokenizer, template, start and end of an answer, and the caption filter."""
    return {
        "format": FORMAT,
        "tokenizer": tokenizer_hash(processor.tokenizer),
        "template": hashlib.sha256(str(processor.chat_template).encode()).hexdigest()[:32],
        "answer_start": processor.answer_start,
        "answer_end": processor.answer_end,
        "prompted": any(processor.prompts),  # an answer without any prompt starts differently
        "captions": captions,
    }


def name_of_tokens(info: dict[str, Any], processor: Any) -> tuple[str, dict[str, Any]]:
    """Return folder name and fingerprint of a processor's token ids in a cache with this `cache.json`."""
    captions = info.get("captions")
    fingerprint = token_fingerprint(processor, captions["fingerprint"] if captions else info["content_hash"])
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16], fingerprint


def encode_answers(processor: Any, answers: Sequence[str], batch: int = 1000) -> list[list[int]]:
    """Return the ids of `processor.encode_answer` for many answers. Equal answers are encoded once.

    Raises:
        UserError: the tokenizer refuses a text.
    """
    unique = list(dict.fromkeys(answers))
    encoded: list[list[int]] = []
    for begin in range(0, len(unique), batch):
        part = unique[begin : begin + batch]
        try:
            encoded += processor.encode_answers(part)
        except ValueError as error:
            raise UserError(f"captions cannot be tokenised: {error}") from error
    ids = dict(zip(unique, encoded))
    return [ids[text] for text in answers]


def build_table(
    prompts: Sequence[Sequence[str | None]], answers: Sequence[Sequence[str]], processor: Any
) -> TokenTable:
    """Build the table of the texts of a split."""
    counts = [len(row) for row in answers]
    flat = [text for row in answers for text in row]
    index: dict[str | None, int] = {}
    prompt_of = [index.setdefault(prompt, len(index)) for row in prompts for prompt in row]
    if len(prompt_of) != len(flat):
        raise CacheDamage(f"{len(prompt_of)} prompts and {len(flat)} answers in a cache: embed again")
    ids = encode_answers(processor, flat)
    return TokenTable(
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        starts=np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64),
        ids=np.array([token for row in ids for token in row], dtype=np.int32),
        prompt_of=np.array(prompt_of, dtype=np.int32),
        prompts=list(index),
    )


def texts_of_views(row: dict[str, Any]) -> list[tuple[int, str | None, str]]:
    """Return the texts of a cache row as `(view, prompt, answer)`, -1 for those that are true of all views."""
    places = [list(zip(*pair)) for pair in zip(row["view_prompts"], row["view_answers"])]
    pairs = zip(row["prompts"], row["answers"])
    found = [(0 if pair in places[0] else -1, *pair) for pair in pairs]
    return found + [(view, *pair) for view, pairs in enumerate(places) if view for pair in pairs]


def _load(folder: Path, rows: list[str]) -> TokenTable:
    """Return a saved table. Raises `UserError` if its checksum or the ids of its rows differ."""
    record = json.loads((folder / "table.json").read_text())
    file = folder / record["shard"]["file"]
    if file_checksum(file) != record["shard"]["xxh3_128"]:
        raise CacheDamage(f"{file} is damaged; remove {folder.parent} and it is built again")
    if record["rows"] != _hash_ids(rows):
        raise UserError(f"token ids in {folder} belong to other rows; remove {folder.parent} and they are built again")
    table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
    # a split without images has a table without batches
    batch = table.to_batches()[0] if len(table) else pa.RecordBatch.from_pylist([], schema=table.schema)
    answers = batch.column("answer_ids")
    return TokenTable(
        first=answers.offsets.to_numpy(),
        starts=answers.values.offsets.to_numpy(),
        ids=answers.values.values.to_numpy(),
        prompt_of=batch.column("prompt").values.to_numpy(),
        prompts=record["prompts"],
        view_of=batch.column("view").values.to_numpy() if "view" in table.column_names else None,
    )


def _hash_ids(ids: list[str]) -> str:
    digest = hashlib.sha256()
    for row_id in ids:
        digest.update(row_id.encode() + b"\0")
    return digest.hexdigest()


def load_or_build_tokens(cache: FeatureCache, split: str, processor: Any) -> TokenTable:
    """Return the table of a split for a processor from `tokens/FINGERPRINT/SPLIT`, and build it there if it is absent.

    `datasets.load_from_disk` opens the folder: `id`, `prompt` (number in `table.json`), `answer_ids`, and `view` where views
    have questions of their own.
    """
    name, fingerprint = name_of_tokens(cache.info, processor)
    folder = cache.folder / "tokens" / name / split
    light = cache.split(split)
    rows = list(light["id"])
    if (folder / "table.json").exists():
        return _load(folder, rows)
    with CacheLock(cache.folder / "tokens"):
        if (folder / "table.json").exists():  # another process built it meanwhile
            return _load(folder, rows)
        features, prompts, answers, views = COLUMNS, light["prompts"], light["answers"], None
        if "view_prompts" in light.column_names:
            texts = [texts_of_views(row) for row in light]
            views, prompts, answers = ([[text[i] for text in own] for own in texts] for i in range(3))
            features = datasets.Features(COLUMNS | {"view": datasets.List(datasets.Value("int32"))})
        table = build_table(prompts, answers, processor)
        starts = pa.array(table.starts, pa.int32())
        ids = pa.ListArray.from_arrays(starts, pa.array(table.ids, pa.int32()))
        first = pa.array(table.first, pa.int32())
        columns = [
            pa.array(rows, pa.string()),
            pa.ListArray.from_arrays(first, pa.array(table.prompt_of, pa.int32())),
            pa.ListArray.from_arrays(first, ids),
        ]
        if views is not None:
            flat = pa.array([view for own in views for view in own], pa.int32())
            columns.append(pa.ListArray.from_arrays(first, flat))
        shard = write_table(folder / "data.arrow", features, columns)
        write_dataset_files(folder.parent, features, {split: [shard["file"]]}, name, dict_file=False)
        record = {"fingerprint": fingerprint, "rows": _hash_ids(rows), "prompts": table.prompts, "shard": shard}
        write_atomically(folder / "table.json", as_json(record))
    return _load(folder, rows)
