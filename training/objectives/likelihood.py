"""Likelihood of answers: the objective of `blipren train`."""

from torch import Tensor
from torch.nn import functional as F


def answer_losses(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the summed negative log-likelihood of answer tokens, and the summed objective with label smoothing.

    Args:
        logits: `[tokens, vocabulary]`, where row i already belongs to target i.
        targets: `[tokens]`.
        label_smoothing: share of each target's probability that is spread over the vocabulary.
    """
    if not label_smoothing:
        nll = F.cross_entropy(logits.float(), targets, reduction="sum")
        return nll, nll
    log_probs = logits.float().log_softmax(dim=-1)
    nll = -log_probs.gather(1, targets[:, None]).sum()
    return nll, (1 - label_smoothing) * nll - label_smoothing * log_probs.mean(dim=-1).sum()
