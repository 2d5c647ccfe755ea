"""One run of `blipren memory`: the images of a feature cache become a memory, or extend one."""

from __future__ import annotations

import time
from typing import Any

import torch

from blipren.consensus_blipren import letters_of_tokens
from blipren.memory_blipren import BliprenMemory, MemorySettings
from blipren.memory_generation_blipren import memory_encoder, memory_language_model, pool_patches
from blipren.ranked_generation_blipren import Candidate
from blipren.training.commands.memory import MemoryCommandSettings
from blipren.training.data.cache import FeatureCache
from blipren.training.data.cache.tokens import encode_answers
from blipren.training.engine.device import choose_device
from blipren.training.engine.loading import load_checkpoint
from blipren.training.errors import UserError
from blipren.training.evaluation.features import PatchFeatures
from blipren.training.evaluation.generation import pad_id, pad_left

ROWS = 256  # images whose patch features are read together
MOST_VALIDATED = 200  # images by which the copy penalty is chosen


def make_memory(s: MemoryCommandSettings) -> None:
    """Run the command. Raises `UserError` for what the user can repair."""
    begin = time.perf_counter()
    model, processor = load_checkpoint(s.model)
    cache = FeatureCache.open(s.cache)
    cache.check_model(model, processor)
    out = s.out_folder()
    embeddings, texts, without = read_cache(cache, s.split, processor)
    if s.extend:
        try:
            model.load_memory(out)
        except (OSError, ValueError) as error:
            raise UserError(f"{out} cannot be extended: {error}") from error
        before = len(model.memory)
        memory = model.memory.extend(embeddings, texts)
        added = len(memory) - before
        print(f"{len(embeddings):,} images with captions = {added:,} new + {len(embeddings) - added:,} known ones")
    else:
        if len(embeddings) < 2:
            raise UserError(f"{s.cache} has {len(embeddings)} images with captions in split {s.split}; 2 are needed")
        letters = letters_of_tokens(decode_tokens(processor, model.config.text_config.vocab_size))
        memory = BliprenMemory.build(embeddings, texts, memory_info(model, processor), letters, MemorySettings())
    model.memory = memory
    if s.max_copies < 1 and not s.extend:
        model = model.to(choose_device(s.device)).eval()
        options = {name: getattr(s, name) for name in ("max_new_tokens", "num_beams", "length_penalty")}
        model.memory = with_copy_penalty(model, processor, cache, s.max_copies, options)
    model.memory.save(out)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(
        f"{len(model.memory):,} images ({without:,} rows without a caption left out), {size / 2**20:,.1f} MiB, "
        f"{time.perf_counter() - begin:.1f} s: the memory is in {out}"
    )


def memory_info(model, processor) -> dict:
    """Return what a memory has to fit: encoder, language model, caption prompts, end token."""
    prompts = [
        [
            token
            for token in processor.encode_prompt(prompt, num_visual_tokens=[1])
            if token != processor.image_token_id
        ]
        for prompt in processor.prompts
    ]
    return {
        "encoder": memory_encoder(model.config),
        "language_model": memory_language_model(model.config),
        "prompts": prompts,
        "end": processor.answer_end_id,
    }


def decode_tokens(processor, vocab_size: int) -> list[str]:
    """Return the text of each token alone; special tokens, and ids that the tokenizer lacks, have none."""
    tokenizer = processor.tokenizer
    found = tokenizer.batch_decode([[i] for i in range(min(vocab_size, len(tokenizer)))], skip_special_tokens=True)
    return found + [""] * (vocab_size - len(found))


def read_cache(cache: FeatureCache, split: str, processor) -> tuple[torch.Tensor, dict[str, list], int]:
    """Return embeddings and texts of a split's images with captions, and the number of those without."""
    kept, captions, tokens = read_captions(cache, split, processor)
    parts = [embed_rows(cache, split, kept[start : start + ROWS]) for start in range(0, len(kept), ROWS)]
    rows = cache.split(split)
    ids, hashes = rows["id"], rows["image_hash"]
    texts = {
        "id": [ids[i] for i in kept],
        "image_hash": [hashes[i] for i in kept],
        "captions": captions,
        "tokens": tokens,
    }
    return torch.cat(parts) if parts else torch.zeros(0, cache.hidden_size), texts, cache.num_rows(split) - len(kept)


def read_captions(
    cache: FeatureCache, split: str, processor
) -> tuple[list[int], list[list[str]], list[list[list[int]]]]:
    """Return the rows of a split that have captions, their captions, and these as token ids without the end token."""
    rows = cache.split(split)
    captions = [
        [answer for prompt, answer in zip(prompts, answers) if prompt is None]
        for prompts, answers in zip(rows["prompts"], rows["answers"])
    ]
    kept = [i for i, own in enumerate(captions) if own]
    flat = iter(encode_answers(processor, [text for i in kept for text in captions[i]]))
    tokens = [[next(flat)[:-1] for _ in captions[i]] for i in kept]
    return kept, [captions[i] for i in kept], tokens


def embed_rows(cache: FeatureCache, split: str, rows: list[int]) -> torch.Tensor:
    """Return the embedding of each row's image, `(rows, width)`: half its own, half the mean over its views.

    Crops and mirror images make the regression a little better. The half that is its own keeps an image so similar to its entry
    that it counts as a near duplicate.
    """
    views = [pool_patches(*cache.patch_features(split, rows, [view] * len(rows))) for view in range(cache.views)]
    return (views[0] + torch.stack(views).mean(dim=0)) / 2


def with_copy_penalty(
    model, processor, cache: FeatureCache, max_copies: float, options: dict[str, Any]
) -> BliprenMemory:
    """Return the memory with the smallest copy penalty by which at most that share of validation images gets a copy.

    Args:
        options: of `generate`.
    """
    count = min(MOST_VALIDATED, cache.num_rows("validation"))
    if not count:
        raise UserError(
            f"{cache.folder} has no validation images, by which the copy penalty is chosen: give --max-copies 1, which "
            "keeps the default penalty"
        )
    model.memory = model.memory.with_settings(copy_penalty=0.0)
    model.memory.leave_out_duplicates = True
    print(f"choosing the copy penalty on {count} validation images")
    ranked: list[list[Candidate]] = []
    for start in range(0, count, 32):
        features = PatchFeatures(*cache.patch_features("validation", range(start, min(count, start + 32))))
        ranked += ranked_candidates(model, processor, features, **options)
    penalty = choose_copy_penalty(ranked, max_copies)
    chosen = model.memory.with_settings(copy_penalty=penalty)
    copies = sum(max(own, key=lambda c: c.score - penalty * c.known).known for own in ranked)
    print(f"copy penalty {penalty:.3f}: {copies} of {count} validation images get a caption of the memory")
    return chosen


def ranked_candidates(model, processor, features: PatchFeatures, **generation) -> list[list[Candidate]]:
    """Return the candidates of the caption prompt for each image, best first."""
    prompts = [processor.encode_prompt(num_visual_tokens=[n]) for n in features.visual_tokens(model.config)]
    ids, mask = pad_left(prompts, pad_id(model, processor))
    return model.rank_captions(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        **features.model_inputs(model.device),
        **{"do_sample": False, **generation},
    )


def choose_copy_penalty(ranked: list[list[Candidate]], max_copies: float) -> float:
    """Return the smallest penalty (ranked without one) by which at most that share of images gets a known caption."""
    margins = []
    for own in ranked:
        known = max((c.score for c in own if c.known), default=float("-inf"))
        new = max((c.score for c in own if not c.known), default=float("-inf"))
        margins.append(known - new)
    margins.sort(reverse=True)
    allowed = int(max_copies * len(margins))
    finite = [margin for margin in margins[allowed:] if margin != float("inf")]
    return max(0.0, finite[0]) if finite else 0.0
