"""Several sources as one."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence

from blipren.training.data.sources.rows import Row, Source, hash_texts


class Mixture(Source):
    """Several sources as one.

    Without weights it has all rows of each source in turn. With weights, rows are drawn in these proportions, each once,
    until one source has no more.
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
