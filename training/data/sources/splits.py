"""The split of a row.

A `split` column decides, then the data set's own splits, then a hash of the image content. The position of a row never
does, so that the order of downloads, a restart or a second data set cannot move an image to another split.
"""

from __future__ import annotations

import hashlib
import re

SPLITS = ("train", "validation", "test")
_ALIASES = {
    "train": "train",
    "training": "train",
    "restval": "train",  # COCO's Karpathy split
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


def normalize_split(name: object) -> str | None:
    """Return `train`, `validation` or `test` for the names in use (`val2017`, `dev`, `restval`, ...), else None."""
    text = str(name).strip().lower()
    if text in _ALIASES:
        return _ALIASES[text]
    found = re.match(r"^(training|train|validation|valid|val|dev|testing|test)[\d_.\-]", text)
    return _ALIASES[found.group(1)] if found else None


def split_by_hash(image_hash: str, validation_share: float, test_share: float) -> str:
    """Return the split of an image from its content hash, with the given shares on average."""
    # hashed again, so that the split does not depend on the first digits of the hash, which have other uses
    place = int.from_bytes(hashlib.blake2b(image_hash.encode(), digest_size=8).digest(), "big") / 2**64
    if place < test_share:
        return "test"
    return "validation" if place < test_share + validation_share else "train"
