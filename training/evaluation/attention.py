"""Attention maps of queries and words on the encoder's true grid, over the image as the encoder saw it.

With scales or tiles along the sequence the grid is the finest one: what a patch of a coarser piece has is spread evenly
over the cells that it covers, and all pieces are added.

The maps of a query are the Q-Former's cross-attention, averaged over heads, for each layer. The map of a word weights the
attention by the gradient of the word's log-probability (Chefer et al. 2021, arXiv:2103.15679: positive part of gradient
times attention). The connector `patches` has no cross-attention; its map of a word is gradient times feature of each
patch. Class and register tokens have no place in the image and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from blipren.training.evaluation.features import PatchFeatures, encode_images
from blipren.training.evaluation.generation import generate_answers, pad_right


@dataclass
class Grid:
    """The grid of patch features in the image that the encoder saw.

    Attributes:
        height, width: in patches. prefix: number of leading tokens that are no patches (class, registers).
        levels: rows and columns of pieces at each resolution, in the order of the patches.
    """

    height: int
    width: int
    prefix: int = 0
    levels: tuple[tuple[int, int], ...] = ((1, 1),)

    def maps(self, values: torch.Tensor) -> torch.Tensor:
        """Return [..., height, width] of [..., tokens], without prefix tokens and padding."""
        if self.levels != ((1, 1),):
            return self._joint_maps(values)
        patches = self.height * self.width
        if values.shape[-1] < self.prefix + patches:
            raise ValueError(
                f"{values.shape[-1]} tokens are too few for {self.prefix} + {self.height} x {self.width} patches"
            )
        return values[..., self.prefix : self.prefix + patches].unflatten(-1, (self.height, self.width))

    def _joint_maps(self, values: torch.Tensor) -> torch.Tensor:
        height = self.height // math.lcm(*(rows for rows, _ in self.levels))  # of a piece
        width = self.width // math.lcm(*(columns for _, columns in self.levels))
        joint, start = 0, 0
        for rows, columns in self.levels:
            count = rows * columns * height * width
            level = values[..., start : start + count].unflatten(-1, (rows, columns, height, width))
            start += count
            level = level.transpose(-3, -2).flatten(-2).flatten(-3, -2)  # [..., rows * height, columns * width]
            down, right = self.height // level.shape[-2], self.width // level.shape[-1]
            level = level.repeat_interleave(down, dim=-2).repeat_interleave(right, dim=-1)
            joint = joint + level / (down * right)
        return joint


def grid_of(config, pixels: dict[str, torch.Tensor] | None = None, row: int = 0) -> Grid:
    """Return the grid of an image: the config's, or the image's own if the encoder's grid differs between images."""
    prefix = config.num_prefix_tokens if config.vision_feature_select == "full" else 0
    if config.pieces_are_a_sequence:
        levels = [(scale, scale) for scale in config.vision_scales]
        if config.vision_tiles is not None:
            rows, columns = pixels["spatial_shapes"][row].tolist()
            levels += [(rows, columns)] * (rows * columns > 1)
        height, width = (side * math.lcm(*ns) for side, ns in zip(config.vision_grid, zip(*levels)))
        return Grid(height, width, 0, tuple(levels))
    if config.vision_grid is not None:
        return Grid(*config.vision_grid, prefix)
    if pixels is None or "spatial_shapes" not in pixels:
        raise ValueError("this encoder's grid differs between images: the processor's spatial_shapes are needed")
    return Grid(*pixels["spatial_shapes"][row].tolist(), prefix)


def seen_image(processor, pixels: dict[str, torch.Tensor], row: int = 0) -> Image.Image:
    """Return the image as the encoder saw it, resized, cropped and padded by the processor, in its original colours."""
    values = pixels["pixel_values"][row].float()
    image_processor = processor.image_processor
    if values.dim() == 4:  # pieces: those of the highest resolution
        rows = columns = (image_processor.scales or [1])[-1]
        if image_processor.tiles:
            rows, columns = pixels["spatial_shapes"][row].tolist()
            values = values[1 : 1 + rows * columns] if rows * columns > 1 else values[:1]
        values = values[-rows * columns :].unflatten(0, (rows, columns))
        values = values.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    elif "spatial_shapes" in pixels:  # NaFlex: rows of patches [patches, side * side * channels]
        height, width = pixels["spatial_shapes"][row].tolist()
        side = int((values.shape[-1] // 3) ** 0.5)
        values = values[: height * width].reshape(height, width, side, side, 3)
        values = values.permute(4, 0, 2, 1, 3).reshape(3, height * side, width * side)
    if getattr(image_processor, "do_normalize", True):
        mean, std = (
            torch.tensor(getattr(image_processor, f"image_{name}"))[:, None, None] for name in ("mean", "std")
        )
        values = values * std + mean
    # without rescaling the processor's values go up to 255
    scale = 255 if getattr(image_processor, "do_rescale", True) else 1
    array = (values * scale).clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).convert("RGB")


@torch.no_grad()
def query_maps(model, features: PatchFeatures, row: int = 0) -> torch.Tensor | None:
    """Return the cross-attention of one image, mean over heads: [layers, queries, height, width]; each sums to at most 1.

    None for the connector `patches`, which has no queries.
    """
    if model.config.connector != "qformer":
        return None
    inputs = features[[row]].model_inputs(model.device)
    attentions = model.get_image_features(**inputs, output_attentions=True).cross_attentions
    grid = grid_of(model.config, features.pixels, row)
    return torch.stack([grid.maps(layer[0].float().mean(dim=0)) for layer in attentions]).cpu()


def token_maps(
    model, processor, features: PatchFeatures, row: int, prompt: str | None, answer_ids: Sequence[int]
) -> tuple[torch.Tensor, list[float]]:
    """Compute the gradient-weighted map of an image for each token of an answer, see [`answer_maps`].

    Args:
        row: the image. prompt: what the answer answers.

    Returns:
        Maps [tokens, height, width] and the log-probability of each token.
    """
    own = features[[row]]
    before = processor.encode_prompt(prompt, num_visual_tokens=own.visual_tokens(model.config))
    maps, log_probabilities = answer_maps(model, own, before, answer_ids)
    return maps[0], log_probabilities


def answer_maps(
    model,
    features: PatchFeatures,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    tokens: Sequence[int] | None = None,
) -> tuple[list[torch.Tensor], list[float]]:
    """Compute the gradient-weighted maps of all images of a prompt for tokens of its answer.

    Args:
        features: of the images, in the order of their placeholders; with `pixels` if the encoder's grid differs between
            images.
        prompt_ids: tokens of the prompt, with placeholders. answer_ids: tokens of the answer, as
            `processor.encode_answer` gives them.
        tokens: places of the tokens in the answer; all by default.

    Returns:
        For each image maps [tokens, height, width], for each video [tokens, frames, height, width], scaled so that the maximum of a token over all images is 1 (all zero
        if nothing is positive), and the log-probability of each token.
    """
    tokens = range(len(answer_ids)) if tokens is None else tokens
    ids, mask = (part.to(model.device) for part in pad_right([[*prompt_ids, *answer_ids]], 0))
    grids = [grid_of(model.config, features.pixels, row) for row in range(len(features))]
    frames = 1
    if model.config.num_frames is not None:
        frames = features.patches.shape[1] // model.config.patches_per_frame
    with torch.enable_grad():
        inputs = features.model_inputs(model.device)
        # all parameters are frozen; the gradient is taken with respect to the patch features
        inputs["patch_features"] = inputs["patch_features"].float().requires_grad_(True)
        image = model.get_image_features(**inputs, output_attentions=model.config.connector == "qformer")
        at = torch.tensor(tokens, device=model.device) + len(prompt_ids)
        logits = model(
            input_ids=ids, attention_mask=mask, mm_encoder_outputs={"image": image}, logits_at=at - 1
        ).logits
        chosen = logits.float().log_softmax(dim=-1).gather(1, ids[0, at, None])[:, 0]  # [tokens]
        maps: list[list[torch.Tensor]] = [[] for _ in grids]
        for token, log_probability in enumerate(chosen):
            again = token + 1 < len(chosen)
            if image.cross_attentions is not None:
                gradients = torch.autograd.grad(log_probability, image.cross_attentions, retain_graph=again)
                weighted = [(g * a).clamp(min=0) for g, a in zip(gradients, image.cross_attentions)]
                relevance = torch.stack([w.float().mean(dim=1).sum(dim=1) for w in weighted]).sum(dim=0)
            else:
                (gradient,) = torch.autograd.grad(log_probability, inputs["patch_features"], retain_graph=again)
                relevance = (gradient * inputs["patch_features"]).float().sum(dim=-1).clamp(min=0)
            if frames > 1:  # Q-Formers that read each frame for itself give it a row of its own
                relevance = relevance.reshape(len(grids), frames, -1)
            # relevance: [images, patches] or [videos, frames, patches]
            own = [grid.maps(values) for grid, values in zip(grids, relevance.detach())]
            largest = torch.stack([values.max() for values in own]).max().clamp(min=1e-12)
            for found, values in zip(maps, own):
                found.append(values / largest)
    return [torch.stack(found).cpu() for found in maps], chosen.detach().cpu().tolist()


def word_maps(tokens: Sequence[str], maps: torch.Tensor) -> tuple[list[str], torch.Tensor]:
    """Join the tokens of each word. Returns the words and their maps [words, height, width], the mean over tokens.

    Args:
        tokens: text of each token as it continues the answer; a word begins with white space.
    """
    words: list[str] = []
    members: list[list[int]] = []
    for i, token in enumerate(tokens):
        if not words or token[:1].isspace():
            words.append(token)
            members.append([i])
        else:
            words[-1] += token
            members[-1].append(i)
    joined = torch.stack([maps[own].mean(dim=0) for own in members])
    return [word.strip() for word in words], joined / joined.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)


def token_texts(processor, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds to the tokens before it."""
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        whole = processor.tokenizer.decode(list(ids[:end]), skip_special_tokens=True)
        if whole.endswith("\ufffd"):  # a part of a character: its text comes with the last part
            texts.append("")
            continue
        texts.append(whole[len(before) :])
        before = whole
    return texts


@dataclass
class QueryStatistics:
    """Statistics that show whether queries attend to different places, of one image or averaged over several.

    Attributes:
        entropy: [queries], of each query's map (mean over layers), as a share of its maximum: 1 is a uniform map.
        overlap: [queries, queries], sum of the smaller of two normalised maps: 1 is the same map.
        dead: queries whose map is flat (entropy above 0.98). identical: pairs of queries with overlap above 0.95.
    """

    entropy: list[float]
    overlap: list[list[float]]
    mean_overlap: float
    dead: list[int]
    identical: list[tuple[int, int]]


def query_statistics(maps: torch.Tensor) -> QueryStatistics:
    """Compute entropy and overlap of queries from maps [layers, queries, height, width] of one image, or [images, ...]."""
    if maps.dim() == 4:
        maps = maps[None]
    flat = maps.double().mean(dim=1).flatten(2)  # [images, queries, patches]
    flat = flat / flat.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    entropy = -(flat * flat.clamp(min=1e-12).log()).sum(dim=-1) / np.log(max(2, flat.shape[-1]))
    entropy = entropy.mean(dim=0)
    overlap = torch.stack([torch.minimum(f[:, None], f[None]).sum(dim=-1) for f in flat]).mean(dim=0)
    count = overlap.shape[0]
    off_diagonal = overlap[~torch.eye(count, dtype=torch.bool)]
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count) if overlap[i, j] > 0.95]
    return QueryStatistics(
        entropy=entropy.tolist(),
        overlap=overlap.tolist(),
        mean_overlap=float(off_diagonal.mean()) if count > 1 else 1.0,
        dead=[i for i, e in enumerate(entropy.tolist()) if e > 0.98],
        identical=pairs,
    )


def feature_norms(model, features: PatchFeatures, row: int = 0) -> torch.Tensor:
    """Return the norm of each patch feature, [height, width]."""
    norms = features.patches[row].float().norm(dim=-1)
    return grid_of(model.config, features.pixels, row).maps(norms)


@dataclass
class Explanation:
    """An image, its caption and the attention maps.

    Attributes:
        seen: the image as the encoder saw it. queries: maps [layers, queries, h, w], None for the connector `patches`.
        words: of the caption. word_maps: [words, h, w]. norms: of the patch features, [h, w].
        router: probability of each expert, None without a mixture of experts.
    """

    seen: Image.Image
    caption: str
    queries: torch.Tensor | None
    words: list[str]
    word_maps: torch.Tensor
    norms: torch.Tensor
    router: list[float] | None


def explain(
    model, processor, image: Image.Image, prompt: str | None = None, caption: str | None = None, **generation
) -> Explanation:
    """Compute the attention maps of an image and its caption, which is generated unless it is given."""
    features = encode_images(model, processor, [image], keep_pixels=True)
    if caption is None:
        caption = generate_answers(model, processor, features, prompt, **generation)[0]["text"]
    router = None
    if model.config.projector == "moe":
        with torch.no_grad():
            probabilities = model.get_image_features(**features.model_inputs(model.device)).router_probs
        router = probabilities[0].float().tolist()
    words, maps = [], torch.zeros(0, *feature_norms(model, features).shape)
    if caption.strip():
        ids = list(processor.encode_answer(caption))[:-1]
        per_token, _ = token_maps(model, processor, features, 0, prompt, ids)
        words, maps = word_maps(token_texts(processor, ids), per_token)
    return Explanation(
        seen=seen_image(processor, features.pixels),
        caption=caption,
        queries=query_maps(model, features),
        words=words,
        word_maps=maps,
        norms=feature_norms(model, features),
        router=router,
    )
