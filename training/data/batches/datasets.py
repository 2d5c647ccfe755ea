"""Torch data sets of finished batches. A batch is a function of the data, the seed and its number alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from blipren.training.data.batches.blocks import Block, PromptEncoder
from blipren.training.data.batches.collate import collate_padded, collate_shared
from blipren.training.data.batches.draws import DRAW, seeded_generator
from blipren.training.data.batches.plan import BatchPlan
from blipren.training.data.batches.training_data import TrainingData


def join_inputs(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Concatenate the model inputs of several caches; patch features of different lengths are padded and masked."""
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
    pad = torch.nn.functional.pad
    return {
        "patch_features": torch.cat([pad(f, (0, 0, 0, longest - f.shape[1])) for f in features]),
        "patch_attention_mask": torch.cat([pad(m, (0, longest - m.shape[1])) for m in masks]),
    }


def image_inputs(
    data: Sequence[TrainingData], order: list[tuple[int, int]], seed: tuple[int, ...] | None
) -> dict[str, torch.Tensor]:
    """Return the model inputs of some `(cache, image)` pairs, in their order; none for texts alone."""
    if not order:
        return {}
    used = sorted({cache for cache, _ in order})
    places = {cache: [i for i, image in enumerate(order) if image[0] == cache] for cache in used}
    inputs = join_inputs(
        [data[c].inputs([order[i][1] for i in places[c]], (*seed, c) if seed else None) for c in used]
    )
    if len(used) == 1:
        return inputs
    # from the order of the caches to the order of the placeholders
    back = torch.tensor([i for c in used for i in places[c]]).argsort()
    return {name: tensor[back] for name, tensor in inputs.items()}


@dataclass(kw_only=True)
class Layout:
    """How the answers of an image become tensors."""

    pad_token_id: int
    shared_prefix: bool = True
    row_tokens: int | None = None
    answers_per_image: int | None = None
    max_answer_tokens: int | None = None
    multiple: int = 1

    def collate(self, blocks: list[Block]) -> dict:
        """Return the tensors of blocks, without the model inputs of their images."""
        if self.shared_prefix:
            return collate_shared(blocks, self.pad_token_id, self.row_tokens, self.multiple)
        return collate_padded(blocks, self.pad_token_id, self.multiple)

    def batch(
        self,
        data: Sequence[TrainingData],
        prompts: PromptEncoder,
        units: Iterable[tuple[int, int]],
        seed: tuple[int, ...] | None,
    ) -> dict:
        """Build the batch of some `(cache, unit)` pairs: the tensors of the layout, model `inputs`, image `ids`.

        Args:
            seed: seed of everything that is drawn; None (validation) draws nothing.
        """
        blocks = []
        for cache, unit in units:
            random = seeded_generator(*seed, DRAW, cache, unit) if seed is not None else None
            own = (*seed, int(cache)) if seed is not None else None
            blocks += data[cache].blocks(int(unit), int(cache), prompts, random, self, own)
        batch = self.collate(blocks)
        order = batch.pop("images")
        batch["inputs"] = image_inputs(data, order, seed)
        batch["ids"] = [data[cache].ids[image] for cache, image in order]
        return batch


class TrainBatches(Dataset):
    """Micro-batches of training. With M micro-batches a step, item i is micro-batch i % M of step i // M."""

    def __init__(
        self, data: Sequence[TrainingData], prompts: PromptEncoder, plan: BatchPlan, layout: Layout, steps: int
    ):
        self.data, self.prompts, self.plan, self.layout, self.steps = data, prompts, plan, layout, steps

    def __len__(self) -> int:
        return self.steps * self.plan.micro_batches

    def __getitem__(self, item: int) -> dict:
        if not 0 <= item < len(self):
            raise IndexError(item)
        step, part = divmod(item, self.plan.micro_batches)
        epoch, images = self.plan.micro_batch(step, part)
        return self.make_batch(images.tolist(), (self.plan.seed, epoch)) | {"item": item}

    def make_batch(self, units: list, seed: tuple[int, ...] | None) -> dict:
        """Return the batch of some `(cache, unit)` pairs; `seed` as in `Layout.batch`."""
        return self.layout.batch(self.data, self.prompts, units, seed)


class EvalBatches(Dataset):
    """Batches of validation: every unit with all its answers, in order. Nothing is drawn."""

    def __init__(self, data: Sequence[TrainingData], prompts: PromptEncoder, layout: Layout, units_per_batch: int):
        self.data, self.prompts, self.layout, self.units_per_batch = data, prompts, layout, units_per_batch
        self.units = [(number, unit) for number, own in enumerate(data) for unit in range(len(own))]

    def __len__(self) -> int:
        return -(-len(self.units) // self.units_per_batch)

    def __getitem__(self, item: int) -> dict:
        if not 0 <= item < len(self):
            raise IndexError(item)
        begin = item * self.units_per_batch
        return self.make_batch(self.units[begin : begin + self.units_per_batch], None)

    make_batch = TrainBatches.make_batch
