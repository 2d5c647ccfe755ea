"""Which split a row belongs to.

A `split` column wins, then the data set's own splits, then a hash of the image content: never the position of the
row, so that the order in which downloads finished, a restart or a second data set cannot move an image.
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
    """`train`, `validation` or `test` for the names in use (`val2017`, `dev`, `restval`, ...), else None."""
    text = str(name).strip().lower()
    if text in _ALIASES:
        return _ALIASES[text]
    found = re.match(r"^(training|train|validation|valid|val|dev|testing|test)[\d_.\-]", text)
    return _ALIASES[found.group(1)] if found else None


def split_by_hash(image_hash: str, validation_share: float, test_share: float) -> str:
    """The split of an image from its content hash alone, with the given shares on average."""
    # Hashed once more, so that the split is independent of anything else that reads the content hash's first digits.
    place = int.from_bytes(hashlib.blake2b(image_hash.encode(), digest_size=8).digest(), "big") / 2**64
    if place < test_share:
        return "test"
    return "validation" if place < test_share + validation_share else "train"
