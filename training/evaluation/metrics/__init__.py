"""Numbers from predictions."""

from blipren.training.evaluation.metrics.captions import caption_metrics

__all__ = ["caption_metrics"]
