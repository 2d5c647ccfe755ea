"""Generation of captions and answers in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from blipren.training.data.sources.images import ImageError, decode_image, read_file
from blipren.training.engine.device import choose_device
from blipren.training.engine.loading import load_checkpoint
from blipren.training.errors import UserError
from blipren.training.evaluation.features import PatchFeatures, encode_images

SHOWN_NEIGHBOURS = 3  # of a memory, for each image


def load_model(path: str, device: str = "auto", **kwargs):
    """Load a checkpoint for inference.

    Args:
        kwargs: for the model's `from_pretrained`, such as `dtype`.

    Returns:
        The model in evaluation mode on its device, and the processor.

    Raises:
        UserError: the folder is no BLIPren checkpoint.
    """
    model, processor = load_checkpoint(path, **kwargs)
    return model.to(choose_device(device)).eval(), processor


def read_image(path: str) -> Image.Image:
    """Read an image file as upright RGB. Raises `UserError` if it cannot be read."""
    try:
        return decode_image(read_file(Path(path)))
    except ImageError as error:
        raise UserError(f"{path} cannot be used as an image ({error.reason}): {error.detail}") from error


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad token ids on the left, for generation. Returns ids and attention mask, both [rows, longest]."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad_token_id] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def pad_right(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad token ids on the right, for losses. Returns ids and attention mask, both [rows, longest]."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([list(row) + [pad_token_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def pad_id(model, processor) -> int:
    """Return a token id to pad with. Padding is masked, so any id will do where the tokenizer has none."""
    candidates = (processor.tokenizer.pad_token_id, model.generation_config.pad_token_id, 0)
    return next(i for i in candidates if i is not None)


def end_ids(model) -> set[int]:
    """Return the ids of the tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return set() if ends is None else set(ends) if isinstance(ends, (list, tuple)) else {ends}


class GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise to logits, from a generator of its own for each row.

    The maximum of logits with Gumbel noise is a sample of their distribution, so that greedy search samples. `generate`
    draws all rows from one generator, so that its samples depend on the batch.
    """

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        noise = [torch.empty(scores.shape[1]).exponential_(generator=g).log() for g in self.generators]
        return scores - torch.stack(noise).to(scores)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen beside `generate`'s own settings.

    Attributes:
        temperature: 0 takes the likeliest token. top_p: share of the probability that is sampled from.
        repetition_penalty: divides (or multiplies) the logits of tokens that the answer has; the prompt does not count.
        seeds: seed of each image, see `image_seed`.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seeds: Sequence[int] = ()

    def processors(self, rows: Sequence[int], prompt_length: int) -> LogitsProcessorList:
        """Return the logits processors of a batch with these rows, whose prompts are padded to `prompt_length`."""
        processors = LogitsProcessorList()
        if self.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty, prompt_length))
        if self.temperature:
            processors.append(TemperatureLogitsWarper(self.temperature))
            processors.append(TopPLogitsWarper(self.top_p))
            processors.append(GumbelNoise([self.seeds[row] for row in rows]))
        return processors


def image_seed(image: Image.Image, seed: int) -> int:
    """Return a seed made from `seed` and the pixels of an RGB image."""
    content = hashlib.sha256(f"{seed} {image.size} ".encode() + image.tobytes())
    return int.from_bytes(content.digest()[:8], "big", signed=True)


@torch.no_grad()
def generate_ids(
    model, processor, prompts: Sequence[Sequence[int]], image_inputs: dict, **generation
) -> list[tuple[list[int], bool]]:
    """Generate behind each prompt, all in one batch.

    Args:
        prompts: token ids of each prompt. image_inputs: the images of all prompts in order, as the model takes them.
        generation: keyword arguments of `generate`; greedy search unless they say otherwise.

    Returns:
        For each prompt the new token ids without the end token, and whether there was one.
    """
    pad, ends = pad_id(model, processor), end_ids(model)
    ids, mask = pad_left(prompts, pad)
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        pad_token_id=pad,
        **image_inputs,
        **{"do_sample": False, **generation},
    )
    results = []
    for answer in output[:, ids.shape[1] :].tolist():
        length = next((k for k, token in enumerate(answer) if token in ends), None)
        results.append((answer[:length], length is not None))
    return results


def generate_batch(
    model, processor, prompts: Sequence[Sequence[int]], image_inputs: dict[str, torch.Tensor], **generation
) -> list[dict]:
    """Generate an answer behind each prompt, all in one batch, see `generate_ids`.

    Returns:
        For each prompt `text`, `num_tokens` (without the end token) and `ended_by_eos`.
    """
    return [
        {"text": processor.decode_answer(new), "num_tokens": len(new), "ended_by_eos": ended}
        for new, ended in generate_ids(model, processor, prompts, image_inputs, **generation)
    ]


def generate_answers(
    model,
    processor,
    images: Sequence[Image.Image] | PatchFeatures | None,
    prompts: Sequence[str | None] | str | None = None,
    batch_size: int = 32,
    progress: Callable[[int], object] | None = None,
    **generation,
) -> list[dict]:
    """Generate an answer to the prompt of every image, in batches of similar length.

    Args:
        images: PIL images, their `PatchFeatures`, or None for prompts without an image (then `prompts` is a list).
        prompts: one for all images, or one an image; None is the model's own caption prompt.
        progress: called with the number of finished rows after each batch.
        generation: keyword arguments of `generate`.

    Returns:
        In the order of the images `text`, `num_tokens` (without the end token) and `ended_by_eos`.

    Raises:
        ValueError: the numbers of images and prompts differ.
    """
    if images is None:
        features, prompts = None, list(prompts)
        encoded = [processor.encode_prompt(prompt, num_visual_tokens=[]) for prompt in prompts]
    else:
        features = images if isinstance(images, PatchFeatures) else encode_images(model, processor, images, batch_size)
        prompts = [prompts] * len(features) if prompts is None or isinstance(prompts, str) else list(prompts)
        if len(prompts) != len(features):
            raise ValueError(f"{len(features)} images and {len(prompts)} prompts: give one prompt an image, or one")
        counts = features.visual_tokens(model.config)
        encoded = [processor.encode_prompt(p, num_visual_tokens=[n]) for p, n in zip(prompts, counts)]
    results: list[dict] = [{} for _ in encoded]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # stable: equal lengths stay in order
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        inputs = {} if features is None else features[rows].model_inputs(model.device)
        answers = generate_batch(model, processor, [encoded[i] for i in rows], inputs, **generation)
        for row, answer in zip(rows, answers):
            results[row] = answer
        if progress is not None:
            progress(len(rows))
    return results
