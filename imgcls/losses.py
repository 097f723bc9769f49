"""Per-example losses: (logits float[B, K], labels float[B, K]) -> float[B]."""

import jax
import optax


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0
) -> jax.Array:
    """Cross-entropy in nats, smoothed by `label_smoothing` (Szegedy et al., arXiv 1512.00567)."""
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(labels, label_smoothing))
