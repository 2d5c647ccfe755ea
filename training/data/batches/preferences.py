"""Batches of preferences: chosen and rejected answers behind the prefix of their images. Nothing about them is drawn, so
that the reference of a pair is the same in every epoch."""

from collections.abc import Iterable, Sequence

from blipren.training.data.batches.blocks import PromptEncoder
from blipren.training.data.batches.datasets import EvalBatches, Layout, TrainBatches, image_inputs
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


class PairBatches(TrainBatches):
    """Micro-batches of training; nothing about pairs is drawn but their order."""

    def make_batch(self, units: list, seed: tuple[int, ...] | None) -> dict:
        return pair_batch(self.data, self.prompts, self.layout, units)


class AllPairs(EvalBatches):
    """Batches of every pair, in order."""

    make_batch = PairBatches.make_batch
