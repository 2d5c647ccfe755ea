"""Image-text retrieval: ranks, recall, re-ranking by matching, and the frozen encoder's own recall.

An image may have several captions. Image to text: the rank of an image is that of its best ranked caption. Text to image:
every caption is a query with one right image. Ties count against the model: a model that gives every pair the same score
has a recall of zero. Recall is a share between 0 and 1, the best median rank is 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from blipren.training.errors import UserError
from blipren.training.objectives.contrast import similarity

RECALL_AT = (1, 5, 10)


# ---------------------------------------------------------------------------------------------------------- ranks
def image_to_text_ranks(scores: Tensor, image_of_text: Tensor) -> Tensor:
    """Return the rank of each image's best ranked caption, `[images]`, from scores `[images, texts]`. 1 is the best."""
    own = image_of_text[None] == torch.arange(len(scores))[:, None]
    if not own.any(1).all():
        raise ValueError(f"Image {int((~own.any(1)).nonzero()[0])} has no caption: leave such images out.")
    best = scores.masked_fill(~own, float("-inf")).amax(1, keepdim=True)
    return 1 + ((scores >= best) & ~own).sum(1)


def text_to_image_ranks(scores: Tensor, image_of_text: Tensor) -> Tensor:
    """Return the rank of each text's image, `[texts]`, from scores `[images, texts]`. 1 is the best."""
    own = scores.gather(0, image_of_text[None])
    return (scores >= own).sum(0)  # the own image is among them


def ranks_of_images(scores: Tensor, captions: Sequence[Sequence[str]]) -> list[dict]:
    """Return `image_to_text_rank` and `text_to_image_ranks` (one for each of its captions) of every image."""
    image_of_text = torch.tensor([index for index, own in enumerate(captions) for _ in own])
    to_text = image_to_text_ranks(scores, image_of_text).tolist()
    to_image = text_to_image_ranks(scores, image_of_text).split([len(own) for own in captions])
    return [{"image_to_text_rank": a, "text_to_image_ranks": b.tolist()} for a, b in zip(to_text, to_image)]


def recall(ranks: Tensor) -> dict[str, float]:
    """Compute `R@1`, `R@5`, `R@10` and `median_rank` of ranks."""
    found = {f"R@{k}": (ranks <= k).double().mean().item() for k in RECALL_AT}
    return found | {"median_rank": ranks.double().quantile(0.5).item()}


def chance(image_of_text: Tensor, images: int) -> dict[str, dict[str, float]]:
    """Compute the expected recall of a random order in both directions, with c captions of an image among t."""
    texts = len(image_of_text)
    captions = torch.bincount(image_of_text, minlength=images).tolist()
    to_text, to_image = {}, {}
    for k in RECALL_AT:
        missed = [math.comb(texts - c, k) / math.comb(texts, k) if k <= texts else 0.0 for c in captions]
        to_text[f"R@{k}"] = 1 - sum(missed) / images
        to_image[f"R@{k}"] = min(k, images) / images
    return {"image_to_text": to_text, "text_to_image": to_image}


def recall_both_ways(
    image_to_text: Tensor, image_of_text: Tensor, text_to_image: Tensor | None = None
) -> dict[str, dict]:
    """Compute recall in both directions. Both score tensors are `[images, texts]`; one is enough where they are the same."""
    text_to_image = image_to_text if text_to_image is None else text_to_image
    return {
        "image_to_text": recall(image_to_text_ranks(image_to_text, image_of_text)),
        "text_to_image": recall(text_to_image_ranks(text_to_image, image_of_text)),
    }


# ----------------------------------------------------------------------------------------------------- re-ranking
def reranked(scores: Tensor, match: Callable[[Tensor, Tensor], Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Re-order the k best candidates by the matching head, as BLIP-2 does with k = 128.

    A candidate's new score is its matching logit plus its similarity. All others keep their order behind the candidates.

    Args:
        scores: `[images, texts]` similarities.
        match: pairs of indices `[pairs]`, `[pairs]` -> matching logits `[pairs]`.
        k: candidates of each query.

    Returns:
        `[images, texts]` scores for image to text, and for text to image.
    """
    results = []
    for direction in (scores, scores.T):
        candidates = direction.topk(min(k, direction.shape[1]), dim=1).indices
        rows = torch.arange(len(direction))[:, None].expand_as(candidates)
        first, second = rows.reshape(-1), candidates.reshape(-1)
        logits = match(first, second) if direction is scores else match(second, first)
        fresh = logits.view_as(candidates).to(direction) + direction.gather(1, candidates)
        behind = direction - direction.max() + fresh.min() - 1  # below every re-ranked score
        results.append(behind.scatter(1, candidates, fresh))
    return results[0], results[1].T


# ---------------------------------------------------------------------------------------------------- whole model
@torch.no_grad()
def embed_images(model, features: Callable, count: int, batch_size: int = 64) -> Tensor:
    """Return image embeddings `[count, Q, D]`, float32 on the CPU. `features(indices)` gives patch features and mask."""
    parts = []
    for start in range(0, count, batch_size):
        patches, mask = features(list(range(start, min(start + batch_size, count))))
        patches = patches.to(model.device)
        mask = None if mask is None else mask.to(model.device)
        parts.append(model.get_image_embeddings(patch_features=patches, patch_attention_mask=mask).float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def embed_texts(model, tokenizer, texts: Sequence[str], batch_size: int = 256, max_length: int = 64) -> Tensor:
    """Return text embeddings `[texts, D]`, float32 on the CPU."""
    parts = []
    for start in range(0, len(texts), batch_size):
        tokens = tokenize(tokenizer, texts[start : start + batch_size], max_length).to(model.device)
        parts.append(model.get_text_embeddings(tokens["input_ids"], tokens["attention_mask"]).float().cpu())
    return torch.cat(parts)


def tokenize(tokenizer, texts: Sequence[str], max_length: int):
    """Return right-padded token ids. No text of a caption becomes a special token."""
    return tokenizer(
        list(texts),
        padding=True,
        truncation=True,
        max_length=max_length,
        return_tensors="pt",
        return_token_type_ids=False,
        split_special_tokens=True,
    )


def matcher(model, tokenizer, features: Callable, texts: Sequence[str], batch_size: int = 64, max_length: int = 64):
    """Return a function from image and text indices to matching logits, which works in batches."""
    ids = tokenizer(
        list(texts), truncation=True, max_length=max_length, return_token_type_ids=False, split_special_tokens=True
    )["input_ids"]

    @torch.no_grad()
    def match(images: Tensor, chosen: Tensor) -> Tensor:
        parts = []
        for start in range(0, len(images), batch_size):
            batch = slice(start, start + batch_size)
            here, inverse = images[batch].unique(return_inverse=True)  # the candidates of a query share its image
            patches, mask = features(here.tolist())
            tokens = tokenizer.pad({"input_ids": [ids[i] for i in chosen[batch].tolist()]}, return_tensors="pt")
            logits = model(
                patch_features=patches[inverse].to(model.device),
                patch_attention_mask=None if mask is None else mask[inverse].to(model.device),
                input_ids=tokens["input_ids"].to(model.device),
                attention_mask=tokens["attention_mask"].to(model.device),
                objective="itm",
            ).logits
            parts.append((logits[:, 1] - logits[:, 0]).float().cpu())
        return torch.cat(parts)

    return match


def evaluate_retrieval(
    model,
    tokenizer,
    features: Callable,
    captions: Sequence[Sequence[str]],
    *,
    batch_size: int = 64,
    rerank: int = 0,
    max_length: int = 64,
) -> tuple[dict, Tensor]:
    """Evaluate retrieval among images and all of their captions.

    Args:
        model: `BliprenForImageTextRetrieval`, in evaluation mode.
        tokenizer: the Q-Former's.
        features: list of image indices -> (patch features `[n, P, D]`, mask `[n, P]` or None).
        captions: each image's captions, at least one.
        rerank: candidates that the matching head re-orders; 0 for none.
        max_length: maximum number of tokens of a caption; never more than the model has positions.

    Returns:
        (metrics, similarities `[images, texts]`). The metrics hold `image_to_text` and `text_to_image` (ITC alone),
        `chance`, `reranked` if `rerank` is not 0, `counts` and `seconds`.
    """
    if not captions or not all(captions):
        raise UserError(
            f"Retrieval needs a caption for every image; got {sum(map(bool, captions))} of {len(captions)}."
        )
    texts = [caption for own in captions for caption in own]
    image_of_text = torch.tensor([index for index, own in enumerate(captions) for _ in own])
    max_length = min(max_length, model.config.qformer_config.max_position_embeddings)

    begin = time.perf_counter()
    image_embeds = embed_images(model, features, len(captions), batch_size)
    with_images = time.perf_counter()
    text_embeds = embed_texts(model, tokenizer, texts, max_length=max_length)
    with_texts = time.perf_counter()
    scores = torch.cat(
        [similarity(part, text_embeds, model.config.itc_pooling) for part in image_embeds.split(batch_size)]
    )
    metrics: dict = recall_both_ways(scores, image_of_text)
    seconds = {
        "embed_images": with_images - begin,
        "embed_texts": with_texts - with_images,
        "search": time.perf_counter() - with_texts,
    }
    metrics["chance"] = chance(image_of_text, len(captions))
    if rerank:
        begin = time.perf_counter()
        match = matcher(model, tokenizer, features, texts, batch_size, max_length)
        metrics["reranked"] = {"k": rerank} | recall_both_ways(*_reordered(scores, match, rerank, image_of_text))
        seconds["rerank"] = time.perf_counter() - begin
    metrics["counts"] = {"images": len(captions), "captions": len(texts), "distinct_captions": len(set(texts))}
    metrics["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
    return metrics, scores


def _reordered(scores: Tensor, match: Callable, k: int, image_of_text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    to_text, to_image = reranked(scores, match, k)
    return to_text, image_of_text, to_image


# ---------------------------------------------------------------------------------------------- the frozen encoder
def has_text_tower(encoder: str, revision: str | None = None) -> bool:
    """Whether an encoder's checkpoint has a text tower that shares a space with the image tower."""
    from transformers import MODEL_MAPPING, AutoConfig

    config = AutoConfig.from_pretrained(encoder, revision=revision)
    return hasattr(MODEL_MAPPING.get(type(config), None), "get_text_features")


@torch.no_grad()
def encoder_recall(
    encoder: str,
    images: Sequence,
    captions: Sequence[Sequence[str]],
    revision: str | None = None,
    batch_size: int = 32,
) -> dict | None:
    """Compute zero-shot recall with the frozen encoder's own text tower (SigLIP, CLIP), which stage 1 has to exceed.

    Args:
        encoder: Hub id or folder of the vision encoder. images: PIL images. captions: each image's.

    Returns:
        Recall in both directions, or None if the encoder has no text tower.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    if not has_text_tower(encoder, revision):
        return None
    config = AutoConfig.from_pretrained(encoder, revision=revision)
    model = AutoModel.from_pretrained(encoder, revision=revision).eval()
    processor = AutoImageProcessor.from_pretrained(encoder, revision=revision)
    tokenizer = AutoTokenizer.from_pretrained(encoder, revision=revision)
    texts = [caption for own in captions for caption in own]
    image_of_text = torch.tensor([index for index, own in enumerate(captions) for _ in own])
    length = config.text_config.max_position_embeddings  # SigLIP's training padded every text to this length

    def pooled(output) -> Tensor:
        return F.normalize(output if isinstance(output, Tensor) else output.pooler_output, dim=-1)

    image_parts = [
        pooled(model.get_image_features(**processor(images=[i.convert("RGB") for i in part], return_tensors="pt")))
        for part in (images[start : start + batch_size] for start in range(0, len(images), batch_size))
    ]
    text_parts = []
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        tokens = tokenizer(part, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        known = {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}
        text_parts.append(pooled(model.get_text_features(**known)))
    return {"encoder": encoder} | recall_both_ways(torch.cat(image_parts) @ torch.cat(text_parts).T, image_of_text)


def encoder_recall_of(model, load: Callable[[int], object], captions: Sequence[Sequence[str]]) -> dict | None:
    """Compute `encoder_recall` of the encoder that a model was made with; None if it is unknown or has no text tower.

    Args:
        load: image index -> PIL image; not called if there is no text tower.
    """
    reference = (model.config.base_models or {}).get("vision")
    if reference is None or not has_text_tower(reference["id"], reference["revision"]):
        return None
    images = [load(index) for index in range(len(captions))]
    return encoder_recall(reference["id"], images, captions, reference["revision"])
