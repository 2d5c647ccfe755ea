"""A conversation about images with a model; its key-value cache is kept from turn to turn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, takewhile

import torch
from PIL import Image
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from blipren.modeling_blipren import CACHE
from blipren.training.errors import UserError
from blipren.training.evaluation.features import PatchFeatures, encode_images
from blipren.training.evaluation.generation import Sampling, end_ids, pad_id


class Conversation:
    """Questions and answers about any number of images.

    Every answer is the one that the model gives to a fresh prompt with the whole conversation. Tokens that the key-value
    cache holds from earlier turns are not computed again.

    Args:
        model, processor: as `load_model` returns them.
        keep_cache: keep the key-value cache between turns; it needs memory.

    Attributes:
        messages: turns of `role` and `content`, in the form that chat templates take; image parts without data.
        images: the images, or the sampled frames of each video, in the order of their parts.
        cached_ids: token ids that the key-value cache holds.
    """

    def __init__(self, model, processor, keep_cache: bool = True):
        self.model, self.processor, self.keep_cache = model, processor, keep_cache
        self.reset()

    def reset(self) -> None:
        """Forget all turns and images."""
        self.messages: list[dict] = []
        self.images: list[Image.Image | list[Image.Image]] = []
        self.features: list[PatchFeatures] = []  # of each image
        self.cached_ids: list[int] = []
        self._cache: DynamicCache | None = None

    @torch.no_grad()
    def ask(
        self,
        text: str | None,
        images: Sequence[Image.Image | list[Image.Image]] = (),
        streamer: BaseStreamer | None = None,
        sampling: Sampling | None = None,
        **generation,
    ) -> str:
        """Ask about the images so far and new ones. The turn is kept only if the answer comes to its end.

        Args:
            text: the question; None is the model's caption prompt.
            images: images, or lists of frames of videos, that come with the question; a conversation has one kind.
            streamer: gets the tokens of the answer as they are generated.
            sampling: temperature, top-p and repetition penalty; greedy search without it.
            generation: keyword arguments of `generate`. Beam search, a memory and a reranker do not use the cache.

        Returns:
            The answer.

        Raises:
            UserError: the conversation is longer than the language model reads, or has images and videos.
        """
        if len({isinstance(image, list) for image in [*self.images, *images]}) > 1:
            raise UserError("a conversation has images or videos, not both: begin a new one")
        text = self.processor.prompts[0] if text is None else text.strip()
        parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
        messages = [*self.messages, {"role": "user", "content": parts}]
        new = encode_images(self.model, self.processor, images) if images else []
        features = self.features + [new[[row]] for row in range(len(new))]
        counts = [count for one in features for count in one.visual_tokens(self.model.config)]
        ids = self.processor.encode_conversation(messages, counts)
        generation = {"do_sample": False, "max_new_tokens": 64} | generation
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if limit is not None:
            if len(ids) >= limit:
                raise UserError(
                    f"the conversation has {len(ids):,} tokens with its images, and the language model reads {limit:,}: "
                    "begin a new one"
                )
            generation["max_new_tokens"] = min(generation["max_new_tokens"], limit - len(ids))
        first_image = 0
        sampled = sampling is not None and sampling.temperature > 0
        # a memory and a reranker make several searches
        ranked = streamer is None and not sampled and bool(self.model.memory or self.model.reranker)
        if sampled:
            generation |= {"use_memory": False, "use_reranker": False}
        if generation.get("num_beams", 1) == 1 and not ranked:
            cache, first_image = self._take_cache(ids, counts)
            generation[CACHE] = cache
        inputs = [one.model_inputs(self.model.device) for one in features[first_image:]]
        joined = {name: torch.cat([each[name] for each in inputs]) for name in (inputs[0] if inputs else ())}
        if sampling is not None:
            generation["logits_processor"] = sampling.processors([0], len(ids))
        rows = torch.tensor([ids], device=self.model.device)
        output = self.model.generate(
            input_ids=rows, attention_mask=torch.ones_like(rows), pad_token_id=pad_id(self.model, self.processor),
            streamer=streamer, **joined, **generation,
        )  # fmt: skip
        answer_ids = output[0, len(ids) :].tolist()
        answer = self.processor.decode_answer(takewhile(lambda token: token not in end_ids(self.model), answer_ids))
        if self.keep_cache and CACHE in generation:
            self._cache = generation[CACHE]
            self.cached_ids = (ids + answer_ids)[: self._cache.get_seq_length()]
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.images, self.features = self.images + list(images), features
        return answer

    def _take_cache(self, ids: list[int], counts: list[int]) -> tuple[DynamicCache, int]:
        """Return the cache with the tokens that `ids` begin with, and the number of images among them."""
        cache, held, self._cache, self.cached_ids = self._cache, self.cached_ids, None, []
        # the last token is always computed: its logits give the first token of the answer
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(held, ids[:-1])))
        boundaries = list(accumulate(counts, initial=0))  # placeholders of the first 0, 1, ... images
        placeholders = ids[:same].count(self.processor.image_token_id)
        if placeholders not in boundaries:  # the features of an image go in as a whole
            same = placeholders = 0
        croppable = cache is not None and cache.is_croppable and not any(cache.is_sliding)
        if same == 0 or (same < len(held) and not croppable):
            return DynamicCache(config=self.model.config.get_text_config()), 0
        if same < len(held):
            cache.crop(same - len(held))
        return cache, boundaries.index(placeholders)
