"""What one visitor of the demo has: a conversation, its last answer, and the maps of its words."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from blipren.training.conversation.conversation import Conversation
from blipren.training.data.sources.images import ImageError, decode_image, read_file
from blipren.training.errors import UserError
from blipren.training.evaluation.attention import answer_maps, seen_image, token_texts
from blipren.training.evaluation.features import PatchFeatures, encode_images
from blipren.training.evaluation.generation import Sampling


@dataclass(frozen=True)
class Limits:
    """What a visitor may ask for.

    Attributes:
        pixels: of a picture. pictures: of a conversation. seconds: time of an answer. tokens: of an answer.
    """

    pixels: int = 50_000_000
    pictures: int = 8
    seconds: float = 120.0
    tokens: int = 256


class StopWhenSet(StoppingCriteria):
    """Ends generation when an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def read_uploads(paths: Sequence[str], limits: Limits) -> list[Image.Image]:
    """Return the pictures of uploaded files.

    Raises:
        UserError: one is no picture, or too large. The message names the file as the visitor does, without its folder.
    """
    images = []
    for path in paths:
        try:
            images.append(decode_image(read_file(Path(path)), max_pixels=limits.pixels))
        except ImageError as error:
            raise UserError(f"{Path(path).name} cannot be used ({error.reason}): {error.detail}.") from error
    return images


@dataclass
class Visit:
    """The conversation of one visitor.

    Attributes:
        conversation: without its key-value cache, which would stay in memory for every visitor.
        shown: messages of the page, in the form of `gradio.Chatbot`.
        answer_ids: tokens of the last answer. words: its words, each with the places of its tokens.
        features: patch features and pixels of all pictures, made when a word is first looked at.
    """

    conversation: Conversation
    shown: list[dict] = field(default_factory=list)
    answer_ids: list[int] = field(default_factory=list)
    words: list[tuple[str, list[int]]] = field(default_factory=list)
    features: PatchFeatures | None = None

    def stream(
        self, question: str | None, images: Sequence[Image.Image], limits: Limits, sampling: Sampling, **generation
    ) -> Iterator[str]:
        """Yield the answer so far, again and again, until it is complete. Closing the iterator stops the model.

        Raises:
            UserError: the conversation is too long, or has too many pictures.
        """
        if len(self.conversation.images) + len(images) > limits.pictures:
            raise UserError(f"A conversation has at most {limits.pictures} pictures: begin a new one.")
        stop, outcome = threading.Event(), []
        tokenizer = self.conversation.processor.tokenizer
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

        def answer() -> None:
            try:
                criteria = StoppingCriteriaList([StopWhenSet(stop)])
                beams = generation.get("num_beams", 1) > 1  # transformers streams single sequences only
                outcome.append(
                    self.conversation.ask(
                        question, images, None if beams else streamer, sampling, stopping_criteria=criteria,
                        max_time=limits.seconds, **generation,
                    )
                )  # fmt: skip
            except Exception as error:  # told by the thread that reads
                outcome.append(error)
            finally:
                streamer.end()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        try:
            text = ""
            for piece in streamer:
                text += piece
                if text.strip():
                    yield text.strip()
            thread.join()
        finally:
            stop.set()
            thread.join()
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        self._split_into_words(outcome[0])
        yield outcome[0]

    def _split_into_words(self, answer: str) -> None:
        processor = self.conversation.processor
        self.answer_ids = processor.encode_answer(answer)[:-1] if answer else []
        places: list[tuple[str, list[int]]] = []
        for place, text in enumerate(token_texts(processor, self.answer_ids)):
            if places and not text[:1].isspace():
                places[-1] = (places[-1][0] + text, [*places[-1][1], place])
            else:
                places.append((text, [place]))
        self.words = [(word.strip(), tokens) for word, tokens in places if word.strip()]
        self.features = None

    def word_picture(self, index: int) -> Image.Image:
        """Return the pictures of the conversation side by side, as the encoder saw them, under the map of a word."""
        conversation = self.conversation
        model, processor = conversation.model, conversation.processor
        if self.features is None:
            self.features = encode_images(model, processor, conversation.images, keep_pixels=True)
        prompt = processor.encode_conversation(conversation.messages[:-1], self.features.visual_tokens(model.config))
        maps, _ = answer_maps(model, self.features, prompt, self.answer_ids, self.words[index][1])
        means = [own.mean(dim=0) for own in maps]
        largest = torch.stack([own.max() for own in means]).max().clamp(min=1e-12)
        rows = [
            overlay(seen_image(processor, self.features.pixels, row), own / largest) for row, own in enumerate(means)
        ]
        joined = Image.new("RGB", (sum(row.width for row in rows) + 8 * (len(rows) - 1), rows[0].height), "white")
        left = 0
        for row in rows:
            joined.paste(row, (left, 0))
            left += row.width + 8
        return joined


def overlay(image: Image.Image, values: torch.Tensor, height: int = 384) -> Image.Image:
    """Return a picture, `height` pixels high, under a map [rows, columns] from 0 to 1; it stays visible where the map is low."""
    image = image.resize((max(1, round(image.width * height / image.height)), height), Image.Resampling.BICUBIC)
    grey = Image.fromarray((values.numpy() * 255).round().astype(np.uint8))
    share = np.asarray(grey.resize(image.size, Image.Resampling.BICUBIC), dtype=np.float32)[..., None] / 255
    colours = colormaps["inferno"](share[..., 0])[..., :3] * 255
    alpha = 0.8 * (0.15 + 0.85 * share)
    return Image.fromarray((np.asarray(image) * (1 - alpha) + colours * alpha).round().astype(np.uint8))
