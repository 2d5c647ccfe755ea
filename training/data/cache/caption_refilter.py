"""Another caption filter for a finished cache. It is applied to the texts of the source; features are not touched."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from blipren.training.data.cache.shards import as_json, write_dataset_files, write_table
from blipren.training.data.cache.similarity_filter import refuse_by_similarity
from blipren.training.data.sources.caption_filter import CaptionFilter, count_captions, filter_texts, summary_table
from blipren.training.data.sources.splits import SPLITS
from blipren.training.errors import UserError
from blipren.training.files import write_atomically

COLUMNS = datasets.Features(
    {
        "id": datasets.Value("string"),
        "place": datasets.Value("int64"),  # row of the split among the features
        "prompts": datasets.List(datasets.Value("string")),
        "answers": datasets.List(datasets.Value("string")),
    }
)


def _source_texts(folder: Path, info: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return every text that the source had for the cached rows of each split, in their order."""
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for unit in info["index"]:
        table = datasets.Dataset.from_file(str(folder / "index" / unit["file"]))
        gone = set(unit["taken_out"])
        wanted = [name for name in ("id", "split", "prompts", "answers", "scores") if name in table.column_names]
        for place, row in enumerate(table.select_columns(wanted)):
            if place not in gone:
                rows[row["split"]].append(row)
    return rows


def filter_captions_again(folder: Path, info: dict[str, Any], settings: dict[str, Any], rules: CaptionFilter) -> None:
    """Make another caption filter the current one of a cache.

    The texts are written to `captions/FINGERPRINT/`, which `datasets.load_from_disk` opens, with a `rejected.jsonl`.
    The columns of the cache do not change. Training skips rows without texts.

    Args:
        settings: the whole caption section of the fingerprint, `min_similarity` and `keep_best` included.
    """
    if settings == info["fingerprint"]["captions"]:
        info.pop("captions", None)
        write_atomically(folder / "cache.json", as_json(info))
        print("captions: as they were embedded")
        return
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    place = Path("captions") / name
    source = _source_texts(folder, info)
    counts = None
    if rules.max_images_per_caption:
        counts = count_captions((row["prompts"], row["answers"]) for rows in source.values() for row in rows)
    by_similarity = settings["min_similarity"] is not None or settings["keep_best"] is not None
    rejected: list[dict[str, Any]] = []
    texts = 0
    files, left = {}, {}
    for split, rows in source.items():
        ids, places, prompts, answers = [], [], [], []
        for number, row in enumerate(rows):
            texts += len(row["answers"])
            kept = filter_texts(row["prompts"], row["answers"], rules, counts)
            gone = list(kept.rejected)
            if by_similarity:
                if "scores" not in row:
                    raise UserError(
                        f"{folder} was embedded without similarities; embed again with --min-similarity -1"
                    )
                refused = refuse_by_similarity(
                    [row["scores"][i] for i in kept.kept], settings["min_similarity"], settings["keep_best"]
                )
                gone += [(*why, kept.answers[i]) for i, why in refused.items()]
                stay = [i for i in range(len(kept.answers)) if i not in refused]
                kept.prompts, kept.answers = [kept.prompts[i] for i in stay], [kept.answers[i] for i in stay]
            for rule, value, text in gone:
                line = {"kind": "text", "id": row["id"], "reason": rule, "value": value, "text": text[:200]}
                rejected.append(line)
            if kept.answers:
                ids.append(row["id"])
                places.append(number)
                prompts.append(kept.prompts)
                answers.append(kept.answers)
            elif row["answers"] or not info.get("samples"):  # an image may be there for conversations alone
                why = gone[0][0] if gone else "no text"
                rejected.append({"kind": "row", "id": row["id"], "reason": "no_caption", "value": why})
        columns = [pa.array(ids, pa.string()), pa.array(places, pa.int64())]
        columns += [pa.array(values, pa.list_(pa.string())) for values in (prompts, answers)]
        files[split] = [write_table(folder / place / split / "data.arrow", COLUMNS, columns)["file"]]
        left[split] = len(ids)
    write_dataset_files(folder / place, COLUMNS, files, name)
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in rejected)
    write_atomically(folder / place / "rejected.jsonl", lines)
    info["captions"] = {"folder": str(place), "fingerprint": name, "settings": settings, "counts": left}
    write_atomically(folder / "cache.json", as_json(info))
    print(summary_table(rejected, sum(map(len, source.values())), texts))
    print(
        f"captions filtered again: {sum(left.values()):,} of {info['counts']['cached']:,} rows have texts; the features "
        f"are untouched; rejections in {folder / place / 'rejected.jsonl'}"
    )
