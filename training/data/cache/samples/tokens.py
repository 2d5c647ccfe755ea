"""Token ids of conversations: what is read, what of it is learned, and where images stand.

An answer's prompt is what the processor gives at inference for the conversation in front of it. As long as each prompt
begins with the tokens so far, the answers of a conversation are learned in one segment. Where a template writes history
differently (it leaves traces of reasoning out, or repeats the system prompt), the answer begins a segment of its own, so
that training and inference see the same tokens in every case.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa

from blipren.training.data.cache.samples.table import messages_of
from blipren.training.data.cache.shards import CacheDamage, as_json, file_checksum, write_dataset_files, write_table
from blipren.training.data.cache.tokens import token_fingerprint
from blipren.training.data.cache.writer.lock import CacheLock
from blipren.training.errors import UserError
from blipren.training.files import write_atomically

if TYPE_CHECKING:
    from blipren.training.data.cache.reader import FeatureCache

COLUMNS = datasets.Features(
    {
        "ids": datasets.List(datasets.List(datasets.Value("int32"))),
        "learned": datasets.List(datasets.List(datasets.Value("bool"))),
        "rejected": datasets.List(datasets.Value("int32")),
    }
)


_TRACE = re.compile(r"\s*<think>(.*?)</think>(?=.*\S)(.*)", re.DOTALL)


@dataclass
class SampleTokens:
    """Segments of the conversations of a split. An image has one placeholder in them.

    A conversation without a system prompt of its own has a variant for each system prompt of the processor.
    """

    first: np.ndarray
    """`[samples * variants + 1]`, where the segments of each begin."""
    starts: np.ndarray
    """`[segments + 1]`, where each segment begins in `ids`."""
    ids: np.ndarray
    """`[tokens]`"""
    learned: np.ndarray
    """`[tokens]`, whether each belongs to an answer."""
    rejected_starts: np.ndarray
    """`[samples * variants + 1]`"""
    rejected_ids: np.ndarray
    """Ids of the worse answers of preferences, with their end tokens."""
    variants: int

    def __len__(self) -> int:
        return (len(self.first) - 1) // self.variants

    def segments(self, sample: int, variant: int = 0) -> list[tuple[list[int], list[bool]]]:
        """Return ids, and whether they are learned, of each segment of a conversation."""
        row = sample * self.variants + variant
        edges = [(self.starts[s], self.starts[s + 1]) for s in range(self.first[row], self.first[row + 1])]
        return [(self.ids[begin:end].tolist(), self.learned[begin:end].tolist()) for begin, end in edges]

    def rejected(self, sample: int) -> list[int]:
        """Return the ids of the worse answer of a preference; empty where there is none."""
        row = sample * self.variants
        return self.rejected_ids[self.rejected_starts[row] : self.rejected_starts[row + 1]].tolist()


def answer_text(message: dict[str, Any]) -> str:
    """Return the text of an assistant's message."""
    return "".join(part["text"] for part in message["content"])


def split_trace(text: str) -> tuple[str | None, str]:
    """Return the trace of reasoning in front of an answer, or None, and the answer."""
    found = _TRACE.match(text)
    return (found[1].strip(), found[2].strip()) if found and found[1].strip() else (None, text)


def encode_sample(
    processor: Any, messages: list[dict[str, Any]], system: str | None = None, traces: str = "learn"
) -> list[tuple[list[int], list[bool]]]:
    """Return the segments of a conversation: ids with one placeholder an image, and which of them are learned.

    Args:
        messages: as `cache/samples/table.py` has them.
        system: system prompt for a conversation without one.
        traces: `learn`, `mask` or `drop` traces of reasoning. Later turns read an answer without its trace, as chat
            templates of reasoning models have it.
    """
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    split = [split_trace(answer_text(messages[turn])) for turn in turns]
    answers = processor.encode_answers([answer for _, answer in split])
    history = list(messages)
    for turn, (_, answer) in zip(turns, split):
        history[turn] = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    segments: list[tuple[list[int], list[bool]]] = []
    for turn, (trace, _), answer in zip(turns, split, answers):
        before = history[:turn]
        images = sum(part["type"] == "image" for message in before for part in message["content"])
        thinks = trace is not None and traces != "drop"
        prompt = processor.encode_conversation(before, [1] * images, system, thinking=thinks)
        thought = processor.encode_trace(trace) if thinks else []
        flags = [traces == "learn"] * len(thought) + [True] * len(answer)
        if segments and prompt[: len(segments[-1][0])] == segments[-1][0]:
            ids, learned = segments[-1]
            learned += [False] * (len(prompt) - len(ids)) + flags
            ids += prompt[len(ids) :] + thought + answer
        else:
            segments.append((prompt + thought + answer, [False] * len(prompt) + flags))
    return segments


def build_sample_tokens(samples: Iterable[dict[str, Any]], processor: Any, traces: str = "learn") -> SampleTokens:
    """Build the table of the conversations of a split.

    Raises:
        UserError: the tokenizer refuses a text; the message names the sample.
    """
    systems = list(processor.system_prompts) or [None]
    counts, lengths, ids, learned, rejected, rejected_lengths = [], [], [], [], [], []
    for sample in samples:
        messages = messages_of(sample["messages"])
        try:
            worse = []
            if sample["rejected"] is not None:
                trace, answer = split_trace(sample["rejected"])
                worse = processor.encode_trace(trace) if trace is not None and traces != "drop" else []
                worse = worse + processor.encode_answer(answer)
            for system in systems:
                segments = encode_sample(processor, messages, system, traces)
                counts.append(len(segments))
                for own, flags in segments:
                    lengths.append(len(own))
                    ids += own
                    learned += flags
                rejected += worse
                rejected_lengths.append(len(worse))
        except ValueError as error:
            raise UserError(f"conversation {sample['id']} cannot be tokenised: {error}") from error
    edges = [np.concatenate([[0], np.cumsum(values)]).astype(np.int64) for values in (counts, lengths)]
    return SampleTokens(
        first=edges[0],
        starts=edges[1],
        ids=np.array(ids, dtype=np.int32),
        learned=np.array(learned, dtype=bool),
        rejected_starts=np.concatenate([[0], np.cumsum(rejected_lengths)]).astype(np.int64),
        rejected_ids=np.array(rejected, dtype=np.int32),
        variants=len(systems),
    )


def load_or_build_sample_tokens(cache: FeatureCache, split: str, processor: Any, traces: str) -> SampleTokens:
    """Return the table of a split from `tokens/FINGERPRINT/SPLIT`, and build it there if it is absent.

    `datasets.load_from_disk` opens the folder.
    """
    fingerprint = token_fingerprint(processor, cache.info["content_hash"])
    fingerprint |= {"system_prompts": list(processor.system_prompts), "traces": traces}
    name = "samples-" + hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache.folder / "tokens" / name / split
    if not (folder / "table.json").exists():
        with CacheLock(cache.folder / "tokens"):
            if not (folder / "table.json").exists():  # another process may have built it meanwhile
                _write(build_sample_tokens(cache.samples(split), processor, traces), folder, split, name, fingerprint)
    record = json.loads((folder / "table.json").read_text())
    file = folder / record["shard"]["file"]
    if file_checksum(file) != record["shard"]["xxh3_128"]:
        raise CacheDamage(f"{file} is damaged; remove {folder.parent} and it is built again")
    table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
    batch = table.to_batches()[0] if len(table) else pa.RecordBatch.from_pylist([], schema=table.schema)
    segments, flags, rejected = (batch.column(column) for column in COLUMNS)
    return SampleTokens(
        first=segments.offsets.to_numpy(),
        starts=segments.values.offsets.to_numpy(),
        ids=segments.values.values.to_numpy(),
        learned=flags.values.values.to_numpy(zero_copy_only=False),
        rejected_starts=rejected.offsets.to_numpy(),
        rejected_ids=rejected.values.to_numpy(),
        variants=record["variants"],
    )


def _write(table: SampleTokens, folder, split: str, name: str, fingerprint: dict[str, Any]) -> None:
    starts, first = pa.array(table.starts, pa.int32()), pa.array(table.first, pa.int32())
    nested = [
        pa.ListArray.from_arrays(first, pa.ListArray.from_arrays(starts, pa.array(values, kind)))
        for values, kind in ((table.ids, pa.int32()), (table.learned, pa.bool_()))
    ]
    worse = pa.ListArray.from_arrays(pa.array(table.rejected_starts, pa.int32()), pa.array(table.rejected_ids))
    shard = write_table(folder / "data.arrow", COLUMNS, [*nested, worse])
    write_dataset_files(folder.parent, COLUMNS, {split: [shard["file"]]}, name, dict_file=False)
    record = {"fingerprint": fingerprint, "variants": table.variants, "shard": shard}
    write_atomically(folder / "table.json", as_json(record))
