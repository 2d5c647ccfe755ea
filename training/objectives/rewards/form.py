"""Rewards of the form of a completion."""

import re
from collections.abc import Sequence


class PatternReward:
    """1 for a completion that matches a regular expression as a whole, else 0."""

    def __init__(self, pattern: str):
        self.pattern = re.compile(pattern, re.DOTALL)

    def __call__(self, completions: Sequence[str], **columns) -> list[float]:
        return [float(self.pattern.fullmatch(text.strip()) is not None) for text in completions]


class LengthReward:
    """1 for a completion of at most `limit` words, less for a longer one: `limit` / its words."""

    def __init__(self, limit: int):
        self.limit = limit

    def __call__(self, completions: Sequence[str], **columns) -> list[float]:
        return [min(1.0, self.limit / max(len(text.split()), 1)) for text in completions]
