"""Rows that a finished cache must not have: repeated ids, and training images that are also held out."""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash

from blipren.training.data.cache.writer.units import CacheWriter
from blipren.training.data.sources.near_duplicates import NearIndex
from blipren.training.data.sources.splits import SPLITS


def find_duplicates(cache: CacheWriter) -> tuple[dict[int, dict[int, tuple[str, str]]], dict[str, int]]:
    """Find repeated ids, and training images that are, or nearly are, a validation or test image.

    Returns:
        The rows to remove, `{unit: {place in its index: (reason, value)}}`, and counts of what was found.
    """
    seen: set[int] = set()
    removed: dict[int, dict[int, tuple[str, str]]] = {}
    held_out: dict[str, list[Any]] = {"id": [], "split": [], "image_hash": [], "phash": [], "thumb": []}
    images: dict[str, set[int]] = {split: set() for split in SPLITS}
    repeated = 0
    for record in cache.records():
        if not record["index"]:
            continue
        index = cache.read_index(record)
        for place, row_id in enumerate(index["id"]):
            key = xxhash.xxh3_64_intdigest(row_id.encode())
            if key in seen:
                removed.setdefault(record["unit"], {})[place] = ("duplicate_id", f"another row has the id {row_id}")
            seen.add(key)
            image = int(index["image_hash"][place][:16], 16)
            repeated += image in images[index["split"][place]]
            images[index["split"][place]].add(image)
        evaluation = index["split"] != "train"
        for name, values in held_out.items():
            values.append(index[name][evaluation])
    counts = {
        "duplicate_ids": sum(map(len, removed.values())),
        "same_image_within_a_split": repeated,
        "same_image_in_validation_and_test": len(images["validation"] & images["test"]),
        "same_image_in_training_and_evaluation": 0,
        "near_duplicates_in_training_and_evaluation": 0,
        "near_duplicates_in_validation_and_test": 0,
    }
    joined = {name: np.concatenate(values) for name, values in held_out.items()} if held_out["id"] else {}
    if not joined or not len(joined["id"]):
        return removed, counts
    known = {image: number for number, image in reversed(list(enumerate(joined["image_hash"])))}
    near = NearIndex(joined["phash"], joined["thumb"])
    validation = joined["split"] == "validation"
    between = NearIndex(joined["phash"][~validation], joined["thumb"][~validation])
    found = between.find(joined["phash"][validation], joined["thumb"][validation])
    counts["near_duplicates_in_validation_and_test"] = len(found)
    for record in cache.records():
        if not record["index"]:
            continue
        index = cache.read_index(record)
        train = np.flatnonzero(index["split"] == "train")
        close = near.find(index["phash"][train], index["thumb"][train])
        for number, place in enumerate(train.tolist()):
            twin = known.get(index["image_hash"][place])
            reason = "same_image"
            if twin is None:
                twin, reason = close.get(number), "near_duplicate"
            if twin is None:
                continue
            long = "same_image" if reason == "same_image" else "near_duplicates"
            counts[f"{long}_in_training_and_evaluation"] += 1
            if cache.near_duplicates == "drop":
                value = f"{joined['split'][twin]} image {joined['id'][twin]}"
                removed.setdefault(record["unit"], {}).setdefault(place, (reason, value))
    return removed, counts
