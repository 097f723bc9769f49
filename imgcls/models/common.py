"""What the architectures share."""

from collections.abc import Callable
from typing import Any

import jax

ModuleDef = Callable[..., Any]


def max_pool(x: jax.Array, window: int = 2) -> jax.Array:
    """Non-overlapping max-pooling: [B, H, W, C] -> [B, H // window, W // window, C].

    A reshape and a maximum, not `nn.max_pool`: XLA differentiates the latter into a
    select-and-scatter, several times slower on a CPU. Among equal maxima the gradient is shared.
    """
    b, h, w, c = x.shape
    h, w = h // window, w // window
    x = x[:, : h * window, : w * window]
    return x.reshape(b, h, window, w, window, c).max((2, 4))
