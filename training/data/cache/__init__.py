"""Features once: the frozen encoder's output and the texts, in Arrow."""

from blipren.training.data.cache.reader import FeatureCache

__all__ = ["FeatureCache"]
