"""Which examples each step takes: a function of the seed and the step alone."""

import functools
from collections.abc import Iterator

import numpy as np


def epoch_order(examples: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of examples in an epoch: a function of (seed, epoch) alone."""
    return _draws(seed, epoch, 0).permutation(examples)


def _draws(seed: int, epoch: int, use: int) -> np.random.Generator:
    # NumPy takes numbers apart into words of 32 bits, and words of 0 at the end do not count.
    return np.random.default_rng([seed % 2**32, epoch, use, seed >> 32])


class TrainOrder:
    """Which examples each training step takes. The last partial batch of an epoch is dropped."""

    def __init__(self, examples: int, *, batch_size: int, seed: int):
        self.batch_size, self.steps_per_epoch = batch_size, examples // batch_size
        self._order = functools.lru_cache(2)(functools.partial(epoch_order, examples, seed=seed))
        self._mirrored_first = _draws(seed, 0, 1).integers(2, size=examples)

    def __getitem__(self, step: int) -> np.ndarray:
        epoch, i = divmod(step, self.steps_per_epoch)
        return self._order(epoch=epoch)[i * self.batch_size : (i + 1) * self.batch_size]

    def mirrored(self, indices: np.ndarray, step: int) -> np.ndarray:
        """bool[B]: the examples that alternating flip mirrors in a step's epoch.

        A random half in the first epoch, the other half in the next, and so on: in any two epochs
        the network sees both views of each image (arXiv 2404.00498, section 3.6).
        """
        return (self._mirrored_first[indices] + step // self.steps_per_epoch) % 2 == 1


def eval_order(examples: int, *, batch_size: int) -> Iterator[np.ndarray]:
    """Every example once, in order, in batches of one size: the last is padded with -1."""
    for start in range(0, examples, batch_size):
        indices = np.arange(start, start + batch_size)
        yield np.where(indices < examples, indices, -1)
