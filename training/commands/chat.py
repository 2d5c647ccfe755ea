"""Talk with a model about images, in the terminal."""

from dataclasses import dataclass

from blipren.training.arguments import check_checkpoint, check_files
from blipren.training.errors import UsageError
from blipren.training.evaluation.settings import SamplingSettings
from blipren.training.settings import choice, positional


@dataclass(kw_only=True)
class ChatSettings(SamplingSettings):
    """`blipren chat`: a conversation about images."""

    model: str = positional()
    """Checkpoint folder or Hub id."""
    images: list[str] = positional(default_factory=list)
    """Pictures that come with the first question. /image PATH adds others, /help shows all commands."""
    max_new_tokens: int = 256
    """Maximum number of tokens of an answer."""
    device: str = choice("auto", "cpu", "cuda", "mps", default="auto")
    """Device to compute on."""

    def __post_init__(self):
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")


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
