"""One question about several images, for `blipren caption --together`."""

import json

from blipren.training.commands.caption import CaptionSettings
from blipren.training.conversation.conversation import Conversation
from blipren.training.evaluation.generation import Sampling, load_model, read_image


def print_one_answer(settings: CaptionSettings) -> None:
    """Print the answer to `settings.prompt` about all images, in their order."""
    images = [read_image(path) for path in settings.images]  # before the model is loaded: a wrong file fails at once
    conversation = Conversation(*load_model(settings.model, settings.device), keep_cache=False)
    sampling = Sampling(settings.temperature, settings.top_p, settings.repetition_penalty, [settings.seed])
    answer = conversation.ask(settings.prompt, images, sampling=sampling, **settings.generate_options())
    if settings.json:
        row = {"images": settings.images, "prompt": settings.prompt, "text": answer}
        print(json.dumps(row, ensure_ascii=False))
    else:
        print(answer)
