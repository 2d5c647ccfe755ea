"""Several sources as one."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from blipren.training.data.sources.rows import Row, Source, hash_texts
from blipren.training.errors import UserError


def split_weights(spec: str) -> list[tuple[str, float | None]]:
    """`A=2,B=1` to `[("A", 2.0), ("B", 1.0)]`; a name without weight has None. Raises `UserError`."""
    if Path(spec).exists() or "," not in spec and "=" not in spec:
        return [(spec, None)]
    parts: list[tuple[str, float | None]] = []
    for part in spec.split(","):
        name, sign, weight = part.strip().rpartition("=")
        if not sign or Path(part.strip()).exists():
            parts.append((part.strip(), None))
            continue
        try:
            parts.append((name, float(weight)))
        except ValueError:
            raise UserError(f"{part!r} is no NAME=WEIGHT: {weight!r} is no number") from None
        if parts[-1][1] <= 0:
            raise UserError(f"the weight of {name} is {weight}; it must be above 0")
    return parts


class Mixture(Source):
    """Several sources. Without weights all rows of each in turn; with weights rows drawn in these proportions, each
    at most once, until one source has no more: no image is embedded twice.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None, seed: int = 0):
        self.sources, self.weights, self.seed = list(sources), weights, seed
        self.name = ", ".join(source.name for source in sources)
        self.columns = sources[0].columns
        counts = [source.num_rows for source in sources]
        self.num_rows = sum(counts) if weights is None and None not in counts else None
        self.fingerprint = hash_texts([*(s.fingerprint for s in sources), json.dumps([weights, seed])])

    def rows(self, start: int = 0) -> Iterator[Row]:
        index = 0
        for number, row in self._drawn():
            if index >= start:
                row.index = index
                row.id = f"{number}/{row.id}"  # ids are unique within a source only
                yield row
            index += 1

    def _drawn(self) -> Iterator[tuple[int, Row]]:
        if self.weights is None:
            for number, source in enumerate(self.sources):
                for row in source.rows():
                    yield number, row
            return
        rng = random.Random(self.seed)
        readers = [source.rows() for source in self.sources]
        while True:
            number = rng.choices(range(len(readers)), self.weights)[0]
            row = next(readers[number], None)
            if row is None:
                return
            yield number, row

    def describe(self) -> str:
        weights = self.weights or [None] * len(self.sources)
        return "\n".join(
            source.describe() + (f"; weight {weight:g}" if weight is not None else "")
            for source, weight in zip(self.sources, weights)
        )
