"""Random generators that depend on nothing but what they are for."""

import numpy as np

ORDER, DRAW, VIEW = 0, 1, 2  # purposes: order of the images, prompts and answers, views


def seeded_generator(*key: int) -> np.random.Generator:
    """Return a generator that is a function of its key: the run's seed, what identifies the draw, and its purpose."""
    return np.random.default_rng([k & 0xFFFFFFFF for k in key])
