"""Types of the columns of a data set that are kept beside images and texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import datasets
import pyarrow as pa

_MEDIA = (datasets.Image, datasets.Audio, datasets.Video)


def undecoded(kind: Any) -> Any:
    """Return the type of a column with images, audio and video in it left as bytes and paths."""
    if isinstance(kind, _MEDIA):
        return type(kind)(decode=False)
    if isinstance(kind, datasets.List):
        return datasets.List(undecoded(kind.feature), length=kind.length)
    if isinstance(kind, dict):
        return {name: undecoded(inner) for name, inner in kind.items()}
    return kind


def infer_features(records: Sequence[dict[str, Any] | None]) -> datasets.Features:
    """Return the types of the columns of JSON records. A column of mixed types becomes text, see `as_text`."""
    names = dict.fromkeys(name for record in records for name in record or ())
    found: dict[str, Any] = {}
    for name in names:
        try:
            kind = pa.array([(record or {}).get(name) for record in records]).type
            found[name] = datasets.features.features.generate_from_arrow_type(kind)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
            found[name] = datasets.Value("string")
    return datasets.Features(found)


def join_features(parts: Sequence[datasets.Features]) -> datasets.Features:
    """Return the columns of all parts. A column whose types differ becomes text, see `as_text`."""
    joined: dict[str, Any] = {}
    for part in parts:
        for name, kind in part.items():
            joined[name] = kind if joined.get(name, kind) == kind else datasets.Value("string")
    return datasets.Features(joined)


def as_text(value: Any) -> str | None:
    """Return a value as the text that it has in a column of mixed types: JSON, or itself if it is a text."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


__all__ = ["as_text", "infer_features", "join_features", "undecoded"]
