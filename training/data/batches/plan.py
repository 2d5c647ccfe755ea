"""Which images each step trains on. Step k is a function of the data's sizes, the seed and k alone."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from blipren.training.data.batches.draws import ORDER, seeded_generator


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The images of each step.

    Epoch e takes the images [e w n, (e + 1) w n) of an endless sequence of permutations of a cache of n images with
    weight w. With a weight of 0.5 every image is seen once in two epochs, with a weight of 2 twice in one. The steps of
    an epoch differ by at most one image: there is no small last step.
    """

    sizes: tuple[int, ...]
    """Images of each cache."""
    weights: tuple[float, ...]
    """How often an epoch takes the images of each cache."""
    seed: int
    images_per_step: int
    """Most images of an optimizer update, over all processes."""
    micro_batches: int = 1
    """Parts of a step, over all processes and accumulation steps."""

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

    @lru_cache(maxsize=2)  # noqa: B019  there is one plan a run
    def epoch_images(self, epoch: int) -> np.ndarray:
        """Return the shuffled `(cache, image)` pairs of an epoch, `[images, 2]`."""
        pairs = []
        for cache, size in enumerate(self.sizes):
            begin, end = self._bounds(cache, epoch)
            for turn in range(begin // size, -(-end // size)):
                order = seeded_generator(self.seed, ORDER, cache, turn).permutation(size)
                piece = order[max(begin - turn * size, 0) : end - turn * size]
                pairs.append(np.stack([np.full_like(piece, cache), piece], axis=1))
        pairs = np.concatenate(pairs)
        if len(self.sizes) > 1:
            pairs = pairs[seeded_generator(self.seed, ORDER, len(self.sizes), epoch).permutation(len(pairs))]
        return pairs

    def step_images(self, step: int) -> tuple[int, np.ndarray]:
        """Return the epoch of a step and its `(cache, image)` pairs, `[images, 2]`."""
        epoch, k = divmod(step, self.steps_per_epoch)
        pairs = self.epoch_images(epoch)
        cuts = np.linspace(0, len(pairs), self.steps_per_epoch + 1).round().astype(int)
        return epoch, pairs[cuts[k] : cuts[k + 1]]

    def micro_batch(self, step: int, part: int) -> tuple[int, np.ndarray]:
        """Return the epoch of a step and the `(cache, image)` pairs of one of its micro-batches."""
        epoch, pairs = self.step_images(step)
        return epoch, np.array_split(pairs, self.micro_batches)[part]
