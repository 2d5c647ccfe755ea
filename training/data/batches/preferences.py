"""Batches of preferences: chosen and rejected answers behind the prefix of their images. Nothing about them is drawn, so
that the reference of a pair is the same in every epoch."""

from collections.abc import Iterable, Sequence

from torch.utils.data import Dataset

from blipren.training.data.batches.blocks import PromptEncoder
from blipren.training.data.batches.datasets import Layout, image_inputs
from blipren.training.data.batches.plan import BatchPlan
from blipren.training.data.batches.samples import CachedSamples


def pair_batch(
    data: Sequence[CachedSamples], prompts: PromptEncoder, layout: Layout, units: Iterable[tuple[int, int]]
) -> dict:
    """Build the batch of some `(cache, unit)` pairs.

    Returns:
        The tensors of the layout, whose segments are chosen, rejected, chosen, ...; model `inputs`; `ids` of the
        images; `pairs`: `(cache, sample)` of each two segments.
    """
    blocks, pairs = [], []
    for cache, unit in units:
        own = data[cache].blocks(int(unit), int(cache), prompts, None, layout)
        blocks += own
        pairs += [(int(cache), segment.sample) for block in own for segment in block.segments[::2]]
    batch = layout.collate(blocks)
    order = batch.pop("images")
    batch["inputs"] = image_inputs(data, order, None)
    batch["ids"] = [data[cache].ids[image] for cache, image in order]
    return batch | {"pairs": pairs}


class PairBatches(Dataset):
    """Micro-batches of training. With M micro-batches a step, item i is micro-batch i % M of step i // M."""

    def __init__(
        self, data: Sequence[CachedSamples], prompts: PromptEncoder, plan: BatchPlan, layout: Layout, steps: int
    ):
        self.data, self.prompts, self.plan, self.layout, self.steps = data, prompts, plan, layout, steps

    def __len__(self) -> int:
        return self.steps * self.plan.micro_batches

    def __getitem__(self, item: int) -> dict:
        if not 0 <= item < len(self):
            raise IndexError(item)
        _, units = self.plan.micro_batch(*divmod(item, self.plan.micro_batches))
        return pair_batch(self.data, self.prompts, self.layout, units.tolist()) | {"item": item}


class AllPairs(Dataset):
    """Batches of every pair, in order."""

    def __init__(self, data: Sequence[CachedSamples], prompts: PromptEncoder, layout: Layout, units_per_batch: int):
        self.data, self.prompts, self.layout, self.units_per_batch = data, prompts, layout, units_per_batch
        self.units = [(number, unit) for number, own in enumerate(data) for unit in range(len(own))]

    def __len__(self) -> int:
        return -(-len(self.units) // self.units_per_batch)

    def __getitem__(self, item: int) -> dict:
        if not 0 <= item < len(self):
            raise IndexError(item)
        begin = item * self.units_per_batch
        return pair_batch(self.data, self.prompts, self.layout, self.units[begin : begin + self.units_per_batch])
