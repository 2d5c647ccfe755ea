"""Settings of the commands that generate answers: evaluate has the first group, chat the second, caption both."""

from dataclasses import dataclass
from typing import Any

from blipren.training.errors import UsageError
from blipren.training.settings import Settings


@dataclass(kw_only=True)
class GenerationSettings(Settings):
    """Generation of captions and answers."""

    prompt: str | None = None
    """Caption prompt or question; by default the model's own caption prompt."""
    max_new_tokens: int = 64
    """Maximum number of tokens of an answer."""
    num_beams: int = 1
    """Number of beams; 1 is greedy search."""
    length_penalty: float = 1.0
    """Beam search: above 1 prefers longer answers."""
    no_repeat_ngram_size: int = 0
    """Length of a word sequence that no answer may repeat; 0 allows all."""
    batch_size: int = 32
    """Number of answers that are generated together."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("batch_size", "max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def generate_options(self) -> dict[str, Any]:
        """Return the keyword arguments of `generate` that these settings give."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}
        if self.num_beams > 1:
            options["length_penalty"] = self.length_penalty
        if self.no_repeat_ngram_size:
            options["no_repeat_ngram_size"] = self.no_repeat_ngram_size
        return options


@dataclass(kw_only=True)
class SamplingSettings(Settings):
    """Sampling and repetition."""

    temperature: float = 0.0
    """Sample with this temperature; 1 is the model's own distribution, 0 is greedy or beam search."""
    top_p: float = 1.0
    """Sampling: keep only the likeliest tokens whose probabilities add up to this."""
    repetition_penalty: float = 1.0
    """Above 1 tokens that the answer already has become less likely."""
    seed: int = 0
    """Sampling: seed. With the same seed an image gets the same answer in any batch, order or selection of images."""

    def __post_init__(self):
        super().__post_init__()
        if self.temperature < 0:
            raise UsageError(f"temperature is {self.temperature}; it must be at least 0")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.repetition_penalty <= 0:
            raise UsageError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0")
        for name in ("top_p", "seed"):
            if not self.temperature and getattr(self, name) != getattr(SamplingSettings, name):
                raise UsageError(f"{name} is for sampling: give a temperature above 0, or leave out {name}")
