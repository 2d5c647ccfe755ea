"""Search among captions by words: BM25 (Robertson and Zaragoza 2009), best caption of each image."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"\w+")
K1, B = 1.2, 0.75


def bm25(query: str, captions: Sequence[Sequence[str]]) -> list[float]:
    """Return the score of each image: that of its best caption, 0 where none has a word of the query."""
    texts = [[Counter(_WORD.findall(caption.lower())) for caption in own] for own in captions]
    flat = [words for own in texts for words in own]
    mean = sum(sum(words.values()) for words in flat) / max(1, len(flat))
    weights = {}
    for word in set(_WORD.findall(query.lower())):
        having = sum(word in words for words in flat)
        weights[word] = math.log(1 + (len(flat) - having + 0.5) / (having + 0.5))

    def score(words: Counter) -> float:
        norm = K1 * (1 - B + B * sum(words.values()) / mean)
        return sum(weight * words[word] * (K1 + 1) / (words[word] + norm) for word, weight in weights.items())

    return [max(map(score, own), default=0.0) for own in texts]
