"""What TRL's losses take of each answer token: its log-probability, and figures of the distribution that it came from."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class TokenScores:
    """Scores by TRL's names, `[tokens]` or `[answers, longest]` with 0 behind the end of an answer."""

    log_probs: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    log_sum_sq_probs: Tensor

    def rows(self, answer: Tensor, place: Tensor, shape: tuple[int, int]) -> "TokenScores":
        """Return flat scores as a row an answer.

        Args:
            answer, place: `[tokens]`, row and column of each token.
            shape: number of answers, tokens of the longest.
        """
        made = {}
        for field in fields(self):
            values = getattr(self, field.name)
            made[field.name] = values.new_zeros(shape).index_put((answer, place), values)
        return TokenScores(**made)


def token_scores(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> TokenScores:
    """Return the scores of targets. The gradient passes through `log_probs` alone.

    Args:
        logits: `[tokens, vocabulary]`, where row i already belongs to target i.
        targets: `[tokens]`.
        temperature: logits are divided by it.
    """
    logits = logits.float() / temperature if temperature != 1 else logits.float()
    log_probs = -F.cross_entropy(logits, targets, reduction="none")
    with torch.no_grad():
        every = logits.log_softmax(dim=-1)
        return TokenScores(
            log_probs=log_probs,
            entropy=-(every.exp() * every).sum(dim=-1),
            mean_logits=logits.mean(dim=-1),
            is_top1=logits.argmax(dim=-1) == targets,
            log_sum_sq_probs=(2 * every).logsumexp(dim=-1),
        )


def answer_places(answer: Tensor) -> Tensor:
    """Return the place of each token in its answer, `[tokens]`.

    Args:
        answer: `[tokens]`, number of the answer of each token; the tokens of an answer stand behind each other.
    """
    every = torch.arange(len(answer), device=answer.device)
    begins = torch.ones_like(answer, dtype=torch.bool)
    begins[1:] = answer[1:] != answer[:-1]
    return every - torch.where(begins, every, 0).cummax(dim=0).values
