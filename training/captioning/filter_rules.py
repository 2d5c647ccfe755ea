"""What the filter of captions can judge. Nothing here imports torch."""

FILTER_RULES = {
    "min_matching_score": lambda answer: answer.matching_score,
    "min_mean_logprob": lambda answer: answer.mean_logprob,
    "min_tokens": lambda answer: answer.num_tokens,
    "max_tokens": lambda answer: answer.num_tokens,
    "min_words": lambda answer: len(answer.text.split()),
    "max_words": lambda answer: len(answer.text.split()),
    "max_repetition": lambda answer: repetition(answer.text),
    "ended": lambda answer: answer.ended,
}


def repetition(text: str) -> float:
    """Return the share of words that the text has said before."""
    words = text.lower().split()
    return 1 - len(set(words)) / len(words) if words else 0.0
