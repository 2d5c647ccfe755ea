"""Caption images, or answer a question about them."""

from dataclasses import dataclass

from blipren.training.arguments import check_checkpoint, check_files
from blipren.training.evaluation.settings import GenerationSettings
from blipren.training.settings import choice, positional


@dataclass(kw_only=True)
class CaptionSettings(GenerationSettings):
    """`blipren caption`: captions for images."""

    model: str = positional()
    """Checkpoint folder or Hub id."""
    images: list[str] = positional()
    """Image files."""
    json: bool = False
    """Print one JSON object a line instead of text."""
    device: str = choice("auto", "cpu", "cuda", "mps", default="auto")
    """Device to compute on."""


def run(settings: CaptionSettings) -> int | None:
    """Run the command. Returns the exit status."""
    check_checkpoint(settings.model)
    check_files(*settings.images)

    import json

    from blipren.training.evaluation.generation import generate_answers, load_model, read_image

    images = [read_image(path) for path in settings.images]  # before the model is loaded: a wrong name fails at once
    model, processor = load_model(settings.model, settings.device)
    answers = generate_answers(
        model, processor, images, settings.prompt, settings.batch_size, **settings.generate_options()
    )
    for path, answer in zip(settings.images, answers):
        if settings.json:
            print(json.dumps({"image": path, "prompt": settings.prompt, **answer}, ensure_ascii=False))
        else:
            print(answer["text"] if len(answers) == 1 else f"{path}: {answer['text']}")
