"""Captions and answers in batches, and the `caption` command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from blipren.training.commands.caption import CaptionSettings
from blipren.training.data.sources.images import ImageError, decode_image, read_file
from blipren.training.engine.device import choose_device
from blipren.training.engine.loading import load_checkpoint
from blipren.training.errors import UserError


@dataclass
class Features:
    """Patch features of images.

    Attributes:
        patches: [images, patches, vision_hidden]. mask: [images, patches] or None where all patches count.
        pixels: what the image processor gave, for pictures of what the encoder saw; None where it was not asked for.
    """

    patches: torch.Tensor
    mask: torch.Tensor | None = None
    pixels: dict[str, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, rows) -> Features:
        pixels = None if self.pixels is None else {name: value[rows] for name, value in self.pixels.items()}
        return Features(self.patches[rows], None if self.mask is None else self.mask[rows], pixels)

    def visual_tokens(self, config) -> list[int]:
        """Visual tokens of each image after the connector."""
        if config.connector == "qformer":
            return [config.num_visual_tokens] * len(self)
        if self.mask is None:
            return [self.patches.shape[1]] * len(self)
        return self.mask.sum(dim=1).tolist()

    def model_inputs(self, device) -> dict[str, torch.Tensor]:
        inputs = {"patch_features": self.patches.to(device)}
        if self.mask is not None:
            inputs["patch_attention_mask"] = self.mask.to(device)
        return inputs


@torch.no_grad()
def encode_photos(
    model, processor, images: Sequence[Image.Image], batch_size: int = 32, keep_pixels=False
) -> Features:
    """Photos through the processor's one resize and the frozen encoder, once for all that is asked about them."""
    parts, pixels = [], []
    for start in range(0, len(images), batch_size):
        inputs = processor.image_processor(images=list(images[start : start + batch_size]), return_tensors="pt")
        parts.append(model.encode_images(**{name: value.to(model.device) for name, value in inputs.items()}).cpu())
        pixels.append(inputs)
    joined = {name: torch.cat([p[name] for p in pixels]) for name in pixels[0]}
    return Features(torch.cat(parts), joined.get("pixel_attention_mask"), joined if keep_pixels else None)


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids -> ids and attention mask [rows, longest], padded on the left."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad_token_id] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def pad_right(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `pad_left`, on the right, where positions need no care: for losses, which nothing is appended to."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([list(row) + [pad_token_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def pad_id(model, processor) -> int:
    """A token to pad with; it is masked, so any will do where the tokenizer has none."""
    candidates = (processor.tokenizer.pad_token_id, model.generation_config.pad_token_id, 0)
    return next(i for i in candidates if i is not None)


def end_ids(model) -> set[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return set() if ends is None else set(ends) if isinstance(ends, (list, tuple)) else {ends}


def _as_list(prompts, count: int) -> list[str | None]:
    prompts = [prompts] * count if prompts is None or isinstance(prompts, str) else list(prompts)
    if len(prompts) != count:
        raise ValueError(f"{count} images and {len(prompts)} prompts: give one prompt an image, or one for all")
    return prompts


@torch.no_grad()
def generate_captions(
    model, processor, images_or_features, prompts=None, batch_size: int = 32, progress=None, **generation
) -> list[dict]:
    """Generates an answer for every image and prompt, in batches of similar length; greedy unless told otherwise.

    Args:
        images_or_features: PIL images, `Features`, patch features [n, patches, vision_hidden], or None: no image at all
            (then `prompts` is a list).
        prompts: one for all, or one an image; None is the model's own caption prompt.
        batch_size: rows generated at once. progress: called with the number of rows done after each batch.
        generation: of `generate`: `max_new_tokens`, `num_beams`, ...

    Returns:
        In the order given: `text`, `num_tokens` (without the end token), `ended_by_eos`.
    """
    if images_or_features is None:
        features, prompts = None, list(prompts)
        encoded = [processor.encode_prompt(prompt, num_visual_tokens=[]) for prompt in prompts]
    else:
        features = images_or_features
        if isinstance(features, torch.Tensor):
            features = Features(features)
        elif not isinstance(features, Features):
            features = encode_photos(model, processor, features, batch_size)
        prompts = _as_list(prompts, len(features))
        counts = features.visual_tokens(model.config)
        encoded = [processor.encode_prompt(p, num_visual_tokens=[n]) for p, n in zip(prompts, counts)]
    generation = {"do_sample": False, **generation}
    ends, pad = end_ids(model), pad_id(model, processor)
    results: list[dict] = [{} for _ in encoded]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # stable: equal lengths stay in order
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids, mask = pad_left([encoded[i] for i in rows], pad)
        inputs = {} if features is None else features[rows].model_inputs(model.device)
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            pad_token_id=pad,
            **inputs,
            **generation,
        )
        for row, answer in zip(rows, output[:, ids.shape[1] :].tolist()):
            length = next((k for k, token in enumerate(answer) if token in ends), None)
            new = answer if length is None else answer[:length]
            text = processor.decode_answer(new)
            results[row] = {"text": text, "num_tokens": len(new), "ended_by_eos": length is not None}
        if progress is not None:
            progress(len(rows))
    return results


def load_model(path: str, device: str = "auto"):
    """Model in evaluation mode on its device, and processor. Raises `UserError` where the folder is none of ours."""
    model, processor = load_checkpoint(path)
    return model.to(choose_device(device)).eval(), processor


def open_photo(path: str) -> Image.Image:
    """An image file as upright RGB. Raises `UserError`."""
    try:
        return decode_image(read_file(Path(path)))
    except ImageError as error:
        raise UserError(f"{path} cannot be used as an image ({error.reason}): {error.detail}") from error


def caption(settings: CaptionSettings) -> None:
    """The `caption` command: a line an image, or a JSON object an image."""
    photos = [open_photo(path) for path in settings.images]  # before the model: a typo should cost nothing
    model, processor = load_model(settings.model, settings.device)
    results = generate_captions(
        model,
        processor,
        photos,
        settings.prompt,
        settings.batch_size,
        **settings.generate_options(),
    )
    for path, result in zip(settings.images, results):
        if settings.json:
            print(json.dumps({"image": path, "prompt": settings.prompt, **result}, ensure_ascii=False))
        else:
            print(result["text"] if len(results) == 1 else f"{path}: {result['text']}")
