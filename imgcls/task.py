"""What is learned: the targets, the loss, and the figures that are averaged over examples.

A task has `targets`, which turns labels into what augmentations may mix, and `figures`, numbers per
example. Training minimises the mean of the figure "loss". The steps sum every figure, and each is
logged under its name in training and in validation. The fields of a task are config keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

Array = jax.Array | np.ndarray


class Task(Protocol):
    def targets(self, labels: Array, num_classes: int) -> Array:
        """int32[B], or float32[B, K], to float32[B, K]."""
        ...

    def figures(self, logits: Array, targets: Array, *, train: bool) -> dict[str, Array]:
        """logits [B, K] and targets [B, K] to {"loss": [B], name: [B], ...}.

        `train` tells the training step, in which labels may be smoothed or weighted.
        """
        ...

    def probabilities(self, logits: Array) -> jax.Array:
        """logits [B, K] to what prediction shows, [B, K] in [0, 1]."""
        ...


@dataclass(frozen=True)
class Classification:
    """One class per image: cross-entropy in nats.

    Args:
        label_smoothing: share of each target that all classes divide (arXiv 1512.00567)
        class_weights: none, or balanced: by the inverse frequency of an example's class
        class_counts: training examples per class, which "balanced" needs
    """

    label_smoothing: float = 0.0
    class_weights: str = "none"
    class_counts: tuple[int, ...] = ()

    def targets(self, labels: Array, num_classes: int) -> Array:
        """One-hot; labels that are distributions over the classes already, such as a teacher's,
        pass."""
        return labels if labels.ndim == 2 else jax.nn.one_hot(labels, num_classes)

    def figures(self, logits: Array, targets: Array, *, train: bool) -> dict[str, Array]:
        smoothed = optax.smooth_labels(targets, self.label_smoothing) if train else targets
        loss = optax.softmax_cross_entropy(logits, smoothed)
        if train and self.class_weights == "balanced":
            loss *= targets @ balanced_weights(self.class_counts)
        return {"loss": loss, "top1": logits.argmax(-1) == targets.argmax(-1)}

    def probabilities(self, logits: Array) -> jax.Array:
        return jax.nn.softmax(logits)


def balanced_weights(counts: tuple[int, ...]) -> Array:
    """float32[K]: N / (K n_k), whose mean over the N examples is 1; 0 for a class without any."""
    n = jnp.asarray(counts, jnp.float32)
    return jnp.where(n > 0, n.sum() / ((n > 0).sum() * jnp.maximum(n, 1)), 0)


TASKS: dict[str, Callable[..., Task]] = {"classification": Classification}
