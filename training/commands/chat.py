"""Talk with a model about images, in the terminal."""

from dataclasses import dataclass

from blipren.training.arguments import check_checkpoint, check_files
from blipren.training.errors import UsageError
from blipren.training.settings import Settings, choice, positional


@dataclass(kw_only=True)
class AnswerSettings(Settings):
    """Generation of answers."""

    max_new_tokens: int = 256
    """Maximum number of tokens of an answer."""
    temperature: float = 0.0
    """Sample with this temperature; 1 is the model's own distribution, 0 is greedy search."""
    top_p: float = 1.0
    """Sampling: keep only the likeliest tokens whose probabilities add up to this."""
    repetition_penalty: float = 1.0
    """Above 1 tokens that the answer already has become less likely."""
    seed: int = 0
    """Sampling: seed."""

    def __post_init__(self):
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if self.temperature < 0:
            raise UsageError(f"temperature is {self.temperature}; it must be at least 0")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.repetition_penalty <= 0:
            raise UsageError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0")


@dataclass(kw_only=True)
class ChatSettings(AnswerSettings):
    """`blipren chat`: a conversation about images."""

    model: str = positional()
    """Checkpoint folder or Hub id."""
    images: list[str] = positional(default_factory=list)
    """Pictures that come with the first question. /image PATH adds others, /help shows all commands."""
    device: str = choice("auto", "cpu", "cuda", "mps", default="auto")
    """Device to compute on."""


def run(settings: ChatSettings) -> None:
    """Run the command."""
    check_checkpoint(settings.model)
    check_files(*settings.images)

    from blipren.training.conversation.conversation import Conversation
    from blipren.training.conversation.terminal import Terminal, read_lines
    from blipren.training.evaluation.generation import Sampling, load_model

    model, processor = load_model(settings.model, settings.device)
    sampling = Sampling(settings.temperature, settings.top_p, settings.repetition_penalty, [settings.seed])
    conversation = Conversation(model, processor)
    terminal = Terminal(conversation, settings.images, sampling, {"max_new_tokens": settings.max_new_tokens})
    terminal.run(read_lines())
