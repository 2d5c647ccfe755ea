"""What an experiment may add to a run of `train`."""

from __future__ import annotations

from torch import Tensor


class Experiment:
    """One more objective beside the likelihood of answers, or another choice of what is learned.

    Attributes:
        weight: of its loss; 0 for an experiment without one.
    """

    weight: float = 0.0

    def prepare(self, model, processor, sources: list) -> None:
        """Change the training sources or add modules to the model, before the parts to train are chosen."""

    def loss(self, trainer, model, batch: dict) -> Tensor | float:
        """Return the loss of a micro-batch, summed over its images.

        Args:
            trainer: the `LikelihoodTrainer`, for its `regularized` inputs and its processor.
            model: the model as the trainer calls it.
            batch: as `TrainBatches` gives it.
        """
        raise NotImplementedError(f"{type(self).__name__} has a weight and no loss")

    def log_values(self) -> dict[str, float]:
        """Return values for the log, of the steps since the last call."""
        return {}
