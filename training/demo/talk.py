"""The conversation of one visitor with one model, its last answer, and the maps of its words."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from blipren.training.conversation.conversation import Conversation
from blipren.training.demo.pictures import join, overlay
from blipren.training.evaluation.attention import answer_maps, seen_image, token_texts
from blipren.training.evaluation.features import PatchFeatures, encode_images
from blipren.training.evaluation.generation import SHOWN_NEIGHBOURS, Sampling


class StopWhenSet(StoppingCriteria):
    """Ends generation when an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


@dataclass
class Talk:
    """A conversation between turns. It holds no model and no key-value cache, so that it can wait for its visitor.

    Attributes:
        messages, images, features: as those of a [`Conversation`].
        answer_ids: tokens of the last answer. words: its words, each with the places of its tokens.
        seen: patch features and pixels of all pictures, made when a word is first looked at.
        known: entries of the model's memory that are most similar to the last picture, as `find_neighbours` returns them.
    """

    messages: list[dict] = field(default_factory=list)
    images: list[Image.Image | list[Image.Image]] = field(default_factory=list)
    features: list[PatchFeatures] = field(default_factory=list)
    answer_ids: list[int] = field(default_factory=list)
    words: list[tuple[str, list[int]]] = field(default_factory=list)
    seen: PatchFeatures | None = None
    known: list[dict] = field(default_factory=list)

    def stream(
        self,
        model,
        processor,
        question: str | None,
        images: Sequence[Image.Image | list[Image.Image]],
        sampling: Sampling,
        **generation,
    ) -> Iterator[str]:
        """Yield the answer so far, again and again, until it is complete. Closing the iterator stops the model.

        Args:
            question, images, sampling, generation: as for [`Conversation.ask`].

        Raises:
            UserError: the conversation is too long.
        """
        conversation = Conversation(model, processor, keep_cache=False)
        conversation.messages, conversation.images = self.messages, self.images
        conversation.features = self.features
        stop, outcome = threading.Event(), []
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        # transformers streams single sequences only; a memory and a reranker rank whole captions
        ranks = not sampling.temperature and bool(model.memory or model.reranker)
        whole = generation.get("num_beams", 1) > 1 or (question is None and ranks)

        def answer() -> None:
            try:
                criteria = StoppingCriteriaList([StopWhenSet(stop)])
                text = conversation.ask(
                    question, images, None if whole else streamer, sampling, stopping_criteria=criteria, **generation
                )
                self._keep(conversation, text)
                outcome.append(text)
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
        finally:
            stop.set()
            thread.join()
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        yield outcome[0]

    def _keep(self, conversation: Conversation, answer: str) -> None:
        """Take over a conversation whose last turn is an answer, and split the answer into words."""
        self.messages, self.images = conversation.messages, conversation.images
        self.features, self.seen = conversation.features, None
        if conversation.model.memory is not None and not isinstance(self.images[-1], list):
            inputs = self.features[-1].model_inputs(conversation.model.device)
            self.known = conversation.model.find_neighbours(SHOWN_NEIGHBOURS, **inputs)[0]
        self.answer_ids = conversation.processor.encode_answer(answer)[:-1] if answer else []
        places: list[tuple[str, list[int]]] = []
        for place, text in enumerate(token_texts(conversation.processor, self.answer_ids)):
            if places and not text[:1].isspace():
                places[-1] = (places[-1][0] + text, [*places[-1][1], place])
            else:
                places.append((text, [place]))
        self.words = [(word.strip(), tokens) for word, tokens in places if word.strip()]

    def word_picture(self, model, processor, index: int) -> Image.Image:
        """Return the pictures of the conversation, as the encoder saw them, under the map of a word of the last answer."""
        if self.seen is None:
            self.seen = encode_images(model, processor, self.images, keep_pixels=True)
        prompt = processor.encode_conversation(self.messages[:-1], self.seen.visual_tokens(model.config))
        maps, _ = answer_maps(model, self.seen, prompt, self.answer_ids, self.words[index][1])
        means = [own.mean(dim=0) for own in maps]
        largest = torch.stack([own.max() for own in means]).max().clamp(min=1e-12)
        pictures = []
        for row, (own, image) in enumerate(zip(means, self.images)):
            if isinstance(image, list):
                pixels, own = (
                    {name: value[row] for name, value in self.seen.pixels.items()},
                    own.reshape(len(image), *own.shape[-2:]),
                )
                pictures += [overlay(seen_image(processor, pixels, n), frame / largest) for n, frame in enumerate(own)]
            else:
                pictures.append(overlay(seen_image(processor, self.seen.pixels, row), own / largest))
        return join(pictures)
