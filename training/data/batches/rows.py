"""From cache rows to batches. Batch k is a function of the rows, the seed and k alone, whatever the world size.

An image and all its answers make a block: one shared prefix (everything up to the last image token: system prompt and
image), then a segment an answer (its question and the answer; the EOS is predicted, never read). Blocks are packed into rows of nearly equal length.
A mask (masks.py) lets a segment see its prefix and itself and nothing else, and positions restart behind the
prefix, so that every answer is read as if it were alone. The padded layout, one row an answer, is for language models
that cannot take such a mask.
"""

from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from heapq import heappop, heappush
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from blipren.training.data.cache.tokens import TokenTable

ORDER, DRAW, VIEW = 0, 1, 2  # what a random generator is for; the first number of its seed after the run's


def generator(*key: int) -> np.random.Generator:
    """A random generator that depends on nothing but its key."""
    return np.random.default_rng([k & 0xFFFFFFFF for k in key])


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Which images step k trains on.

    Epoch e takes from a cache of n images with weight w the pieces [e w n, (e + 1) w n) of an endless sequence of its
    permutations, so that a weight of 0.5 sees every image in two epochs and a weight of 2 twice in one. An epoch's
    steps are equally large to within one image: none is a small rest.
    """

    sizes: tuple[int, ...]
    """Images of each cache."""
    weights: tuple[float, ...]
    """How often an epoch takes each cache's images."""
    seed: int
    images_per_step: int
    """Images of an optimizer update over all processes: at most this many."""
    micro_batches: int = 1
    """Parts that a step is cut into, over all processes and accumulation steps together."""

    def __post_init__(self):
        if self.images_per_epoch < 1 or min(self.sizes) < 1:
            raise ValueError(f"no image to train on: {self.sizes} images with weights {self.weights}")
        if self.images_per_epoch // self.steps_per_epoch < self.micro_batches:
            raise ValueError(
                f"a step of {self.images_per_epoch // self.steps_per_epoch} images cannot be cut into "
                f"{self.micro_batches} micro-batches; raise the batch size or lower the accumulation"
            )

    def _bounds(self, cache: int, epoch: int) -> tuple[int, int]:
        per_epoch = self.sizes[cache] * self.weights[cache]
        return round(epoch * per_epoch), round((epoch + 1) * per_epoch)

    @property
    def images_per_epoch(self) -> int:
        return sum(self._bounds(c, 0)[1] for c in range(len(self.sizes)))

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.images_per_epoch // self.images_per_step)

    @lru_cache(maxsize=2)  # noqa: B019  a plan lives as long as its run
    def epoch_images(self, epoch: int) -> np.ndarray:
        """[images of the epoch, 2]: (cache, image), shuffled."""
        pairs = []
        for cache, size in enumerate(self.sizes):
            begin, end = self._bounds(cache, epoch)
            for turn in range(begin // size, -(-end // size)):
                order = generator(self.seed, ORDER, cache, turn).permutation(size)
                piece = order[max(begin - turn * size, 0) : end - turn * size]
                pairs.append(np.stack([np.full_like(piece, cache), piece], axis=1))
        pairs = np.concatenate(pairs)
        if len(self.sizes) > 1:
            pairs = pairs[generator(self.seed, ORDER, len(self.sizes), epoch).permutation(len(pairs))]
        return pairs

    def step_images(self, step: int) -> tuple[int, np.ndarray]:
        """The epoch of a step, and its [images, 2]: (cache, image)."""
        epoch, k = divmod(step, self.steps_per_epoch)
        pairs = self.epoch_images(epoch)
        cuts = np.linspace(0, len(pairs), self.steps_per_epoch + 1).round().astype(int)
        return epoch, pairs[cuts[k] : cuts[k + 1]]

    def micro_batch(self, step: int, part: int) -> tuple[int, np.ndarray]:
        """The epoch, and the (cache, image) pairs of one part of a step."""
        epoch, pairs = self.step_images(step)
        return epoch, np.array_split(pairs, self.micro_batches)[part]


@dataclass
class Block:
    """One image, its shared prefix, and the segments behind it."""

    image: tuple[int, int]
    """(cache, image)"""
    prefix: list[int]
    segments: list[tuple[list[int], list[int]]] = field(default_factory=list)
    """(prompt ids behind the last image token, answer ids)"""

    def __len__(self) -> int:
        """Tokens that the language model reads: all but each answer's last, behind which nothing is predicted."""
        return len(self.prefix) + sum(len(prompt) + len(answer) - 1 for prompt, answer in self.segments)


class PromptEncoder:
    """Prompts as (prefix up to the last image token, rest), encoded once each, drawn from the processor's pools."""

    def __init__(self, processor):
        self.image_token_id = processor.image_token_id
        self.caption_prompts = list(processor.prompts) or [None]
        self.system_prompts = list(processor.system_prompts or []) or [None]

        @lru_cache(maxsize=1 << 16)
        def encode(prompt: str | None, system: str | None, num_visual_tokens: int) -> tuple[list[int], list[int]]:
            ids = processor.encode_prompt(prompt=prompt, system=system, num_visual_tokens=[num_visual_tokens])
            if ids.count(self.image_token_id) != num_visual_tokens:
                raise ValueError(
                    f"prompt {prompt!r} has {ids.count(self.image_token_id)} image tokens, not {num_visual_tokens}"
                )
            end = len(ids) - ids[::-1].index(self.image_token_id)
            return ids[:end], ids[end:]

        self.encode = encode

    def draw(self, prompt: str | None, random: np.random.Generator | None) -> str | None:
        """A null prompt becomes one of the caption prompts; without a generator (validation) the first one."""
        if prompt is not None:
            return prompt
        return self.caption_prompts[random.integers(len(self.caption_prompts)) if random is not None else 0]

    def draw_system(self, random: np.random.Generator | None) -> str | None:
        return self.system_prompts[random.integers(len(self.system_prompts)) if random is not None else 0]


def build_blocks(
    image: tuple[int, int],
    answers: list[tuple[str | None, list[int]]],
    num_visual_tokens: int,
    prompts: PromptEncoder,
    random: np.random.Generator | None = None,
    answers_per_image: int | None = None,
    max_answer_tokens: int | None = None,
    max_block_tokens: int | None = None,
) -> list[Block]:
    """The blocks of an image: one, unless its answers need more than one prefix or more than `max_block_tokens`.

    With a generator, system prompt and caption prompts are drawn, and `answers_per_image` answers if given; without
    one (validation) all answers are taken with the first prompts. An answer longer than `max_answer_tokens` is cut;
    its EOS goes with the rest, so that a cut is never learned as an end.
    """
    if random is not None and answers_per_image is not None and answers_per_image < len(answers):
        answers = [answers[i] for i in sorted(random.choice(len(answers), answers_per_image, replace=False))]
    system = prompts.draw_system(random)
    blocks: list[Block] = []
    for prompt, answer in answers:
        prefix, rest = prompts.encode(prompts.draw(prompt, random), system, num_visual_tokens)
        answer = answer[:max_answer_tokens]
        block = next((b for b in blocks if b.prefix == prefix), None)
        full = block and max_block_tokens and len(block) + len(rest) + len(answer) - 1 > max_block_tokens
        if block is None or full:
            block = Block(image, prefix)
            blocks.insert(0, block)  # the newest block of a prefix is found first
        block.segments.append((rest, answer))
    return blocks[::-1]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: indices of `lengths` in bins of at most `capacity` (an item above it gets a bin alone)."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = next((r for r in room if r[0] >= lengths[index]), None)
        if fits is None:
            bins.append([])
            fits = (capacity, len(bins) - 1)
        else:
            room.remove(fits)
        bins[fits[1]].append(index)
        insort(room, (fits[0] - lengths[index], fits[1]))
    return bins


def spread(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Indices of `lengths` in at most `rows` bins of nearly equal sums: the longest first, each into the emptiest bin
    (Graham 1969)."""
    bins: list[list[int]] = [[] for _ in range(rows)]
    filled = [(0, number) for number in range(rows)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, number = heappop(filled)
        bins[number].append(index)
        heappush(filled, (tokens + lengths[index], number))
    return [bin for bin in bins if bin]


def pack_rows(
    lengths: Sequence[int], row_tokens: int | None = None, attention_cost: float = 1 / 4096
) -> list[list[int]]:
    """Packs blocks into rows of at most `row_tokens`; without it, into as many rows as cost least.

    A dense mask is paid for on all of a row, so that the cost of R rows of L tokens is taken as R L (1 +
    `attention_cost` L): about right for the shapes of small language models, where long rows only pay while they save
    padding.
    """
    longest = max(lengths)
    if row_tokens is not None:
        return pack(lengths, max(row_tokens, longest))

    def cost(bins: list[list[int]]) -> float:
        length = max(sum(lengths[i] for i in bin) for bin in bins)
        return len(bins) * length * (1 + attention_cost * length)

    most = sum(lengths) / longest  # rows as short as the longest block
    counts = {max(1, round(most * (1 / 6) ** (i / 39))) for i in range(40)}  # up to six of the longest in a row
    return min((spread(lengths, count) for count in sorted(counts)), key=cost)


def collate_shared(blocks: list[Block], pad_token_id: int, row_tokens: int | None = None, multiple: int = 1) -> dict:
    """Blocks packed into rows: `input_ids`, `position_ids`, `block_ids`, `segment_ids`, `is_answer` [rows, length];
    `predict_from` and `targets` [labels]: token `targets[i]` is to be predicted at flat position `predict_from[i]`; and
    the `images` in the order of their placeholders.

    A segment without prompt has its first token predicted by the last prefix token, which several segments share:
    that is why targets are pairs and not a labels tensor.
    """
    rows = pack_rows([len(block) for block in blocks], row_tokens)
    length = max(sum(len(blocks[b]) for b in row) for row in rows)
    length = -(-length // multiple) * multiple
    shape = (len(rows), length)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    block_ids = np.full(shape, -1, dtype=np.int32)  # padding is a block of its own: it attends to itself, never NaN
    segment_ids = np.zeros(shape, dtype=np.int32)
    is_answer = np.zeros(shape, dtype=bool)
    predict_from, targets, images = [], [], []
    for r, row in enumerate(rows):
        cursor = 0
        for number, b in enumerate(row):
            block, start = blocks[b], cursor
            images.append(block.image)
            behind_prefix = start + len(block.prefix)
            input_ids[r, start:behind_prefix] = block.prefix
            position_ids[r, start:behind_prefix] = np.arange(len(block.prefix))
            cursor = behind_prefix
            for s, (prompt, answer) in enumerate(block.segments, start=1):
                answer_at = cursor + len(prompt)
                end = answer_at + len(answer) - 1
                input_ids[r, cursor:end] = prompt + answer[:-1]
                position_ids[r, cursor:end] = len(block.prefix) + np.arange(end - cursor)
                segment_ids[r, cursor:end] = s
                is_answer[r, answer_at:end] = True
                predicting = [answer_at - 1 if prompt else behind_prefix - 1, *range(answer_at, end)]
                predict_from.extend(r * length + p for p in predicting)
                targets.extend(answer)
                cursor = end
            block_ids[r, start:cursor] = number
    tensors = dict(
        input_ids=input_ids,
        position_ids=position_ids,
        block_ids=block_ids,
        segment_ids=segment_ids,
        is_answer=is_answer,
        predict_from=np.asarray(predict_from, dtype=np.int64),
        targets=np.asarray(targets, dtype=np.int64),
    )
    return {name: torch.from_numpy(array) for name, array in tensors.items()} | {"images": images}


def collate_padded(blocks: list[Block], pad_token_id: int, multiple: int = 1) -> dict:
    """One right-padded row an answer, image and prompt repeated: `input_ids`, `attention_mask`, `position_ids`, and
    `is_answer`, `predict_from`, `targets`, `images` as `collate_shared` gives them."""
    rows = [(block, prompt, answer) for block in blocks for prompt, answer in block.segments]
    length = max(len(block.prefix) + len(prompt) + len(answer) - 1 for block, prompt, answer in rows)
    length = -(-length // multiple) * multiple
    input_ids = np.full((len(rows), length), pad_token_id, dtype=np.int64)
    attention_mask = np.zeros((len(rows), length), dtype=np.int64)
    is_answer = np.zeros(input_ids.shape, dtype=bool)
    predict_from, targets = [], []
    for r, (block, prompt, answer) in enumerate(rows):
        answer_at = len(block.prefix) + len(prompt)
        end = answer_at + len(answer) - 1
        input_ids[r, :end] = block.prefix + prompt + answer[:-1]
        attention_mask[r, :end] = 1
        is_answer[r, answer_at:end] = True
        predict_from.extend(range(r * length + answer_at - 1, r * length + end))
        targets.extend(answer)
    tensors = dict(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=np.broadcast_to(np.arange(length), input_ids.shape).copy(),
        is_answer=is_answer,
        predict_from=np.asarray(predict_from, dtype=np.int64),
        targets=np.asarray(targets, dtype=np.int64),
    )
    return {name: torch.from_numpy(array) for name, array in tensors.items()} | {
        "images": [block.image for block, _, _ in rows]
    }


def useful_share(batch: dict) -> float:
    """Share of the positions of a batch that are tokens rather than padding."""
    used = batch["block_ids"] >= 0 if "block_ids" in batch else batch["attention_mask"] > 0
    return used.float().mean().item()


class Source(Protocol):
    """Where a batch's images and texts come from: a feature cache's split, or images decoded as they are needed."""

    ids: Sequence[str]
    """Stable id of each image, named when a batch goes wrong."""
    texts: TokenTable

    def visual_tokens(self, image: int) -> int:
        """Number of placeholders of an image."""

    def inputs(self, images: list[int], seed: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
        """Model inputs of these images, such as `patch_features` [n, patches, width]. What is drawn for an image (a
        view, an augmentation) comes from `generator(*seed, VIEW, image)`; without a seed nothing is drawn."""


def join_inputs(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Inputs of several sources as one; patch features of different lengths are padded and masked."""
    if len(parts) == 1:
        return parts[0]
    if "patch_features" not in parts[0]:
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    features = [part["patch_features"] for part in parts]
    masks = [part.get("patch_attention_mask") for part in parts]
    longest = max(f.shape[1] for f in features)
    if all(m is None for m in masks) and all(f.shape[1] == longest for f in features):
        return {"patch_features": torch.cat(features)}
    masks = [torch.ones(f.shape[:2], dtype=torch.long) if m is None else m.long() for f, m in zip(features, masks)]
    grow = torch.nn.functional.pad
    return {
        "patch_features": torch.cat([grow(f, (0, 0, 0, longest - f.shape[1])) for f in features]),
        "patch_attention_mask": torch.cat([grow(m, (0, longest - m.shape[1])) for m in masks]),
    }


@dataclass(kw_only=True)
class Layout:
    """How blocks become tensors, and what of an image's answers is taken."""

    pad_token_id: int
    shared_prefix: bool = True
    row_tokens: int | None = None
    answers_per_image: int | None = None
    max_answer_tokens: int | None = None
    multiple: int = 1

    def batch(
        self,
        sources: Sequence[Source],
        prompts: PromptEncoder,
        images: Iterable[tuple[int, int]],
        seed: tuple[int, ...] | None,
    ) -> dict:
        """The batch of these (cache, image) pairs. `seed` makes every draw; None (validation) draws nothing."""
        blocks = []
        for cache, image in images:
            source = sources[cache]
            random = generator(*seed, DRAW, cache, image) if seed is not None else None
            blocks += build_blocks(
                (int(cache), int(image)),
                source.texts.answers(image),
                source.visual_tokens(image),
                prompts,
                random,
                self.answers_per_image,
                self.max_answer_tokens,
                self.row_tokens,
            )
        if self.shared_prefix:
            batch = collate_shared(blocks, self.pad_token_id, self.row_tokens, self.multiple)
        else:
            batch = collate_padded(blocks, self.pad_token_id, self.multiple)
        order = batch.pop("images")
        used = sorted({cache for cache, _ in order})
        places = {cache: [i for i, image in enumerate(order) if image[0] == cache] for cache in used}
        inputs = join_inputs(
            [sources[c].inputs([order[i][1] for i in places[c]], (*seed, c) if seed else None) for c in used]
        )
        if len(used) > 1:  # back from source by source into the order of the placeholders
            back = torch.tensor([i for c in used for i in places[c]]).argsort()
            inputs = {name: tensor[back] for name, tensor in inputs.items()}
        batch["inputs"] = inputs
        batch["ids"] = [sources[cache].ids[image] for cache, image in order]
        return batch


class TrainBatches(Dataset):
    """Item i is the finished micro-batch i % M of step i // M, for M micro-batches a step over all processes."""

    def __init__(self, sources: Sequence[Source], prompts: PromptEncoder, plan: BatchPlan, layout: Layout, steps: int):
        self.sources, self.prompts, self.plan, self.layout, self.steps = sources, prompts, plan, layout, steps

    def __len__(self) -> int:
        return self.steps * self.plan.micro_batches

    def __getitem__(self, item: int) -> dict:
        if not 0 <= item < len(self):
            raise IndexError(item)
        step, part = divmod(item, self.plan.micro_batches)
        epoch, images = self.plan.micro_batch(step, part)
        batch = self.layout.batch(self.sources, self.prompts, images.tolist(), (self.plan.seed, epoch))
        batch["item"] = item
        return batch


class EvalBatches(Dataset):
    """Every image of a source with all its answers, in order, `images_per_batch` at a time, nothing drawn."""

    def __init__(self, source: Source, prompts: PromptEncoder, layout: Layout, images_per_batch: int):
        self.source, self.prompts, self.layout, self.images_per_batch = source, prompts, layout, images_per_batch

    def __len__(self) -> int:
        return -(-len(self.source.texts) // self.images_per_batch)

    def __getitem__(self, item: int) -> dict:
        if not 0 <= item < len(self):
            raise IndexError(item)
        begin = item * self.images_per_batch
        images = [(0, i) for i in range(begin, min(begin + self.images_per_batch, len(self.source.texts)))]
        return self.layout.batch([self.source], self.prompts, images, None)
