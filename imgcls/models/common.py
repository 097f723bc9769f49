"""What the architectures share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ModuleDef = Callable[..., Any]


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """Max-pooling over 2x2 windows without overlap: [B, H, W, C] -> [B, H // 2, W // 2, C].

    The value and gradient of `nn.max_pool(x, (2, 2), (2, 2))`: of equal maxima, the first gets the
    gradient. XLA differentiates that one into a select-and-scatter, several times slower on a CPU,
    and keeps x for it; here the position of each maximum is kept, one byte.
    """
    return _windows(x).max((2, 4))


def _windows(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H // 2, 2, W // 2, 2, C]."""
    b, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)


def _max_pool_fwd(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    windows = _windows(x)
    (top_left, top_right), (low_left, low_right) = (
        (windows[:, :, row, :, 0], windows[:, :, row, :, 1]) for row in (0, 1)
    )
    top, low = jnp.maximum(top_left, top_right), jnp.maximum(low_left, low_right)
    position = jnp.where(low > top, 2 + (low_right > low_left), top_right > top_left)
    size = jnp.zeros((0, *x.shape[1:3]))  # for its shape alone
    return jnp.maximum(top, low), (position.astype(jnp.uint8), size)


def _max_pool_bwd(residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array]:
    position, (_, height, width) = residuals[0], residuals[1].shape
    enlarge = lambda a: a.repeat(2, axis=1).repeat(2, axis=2)
    _, h, w, _ = grad.shape
    here = 2 * (jnp.arange(2 * h) % 2)[:, None] + jnp.arange(2 * w) % 2
    grad = jnp.where(enlarge(position) == here[None, :, :, None], enlarge(grad), 0)
    return (jnp.pad(grad, ((0, 0), (0, height - 2 * h), (0, width - 2 * w), (0, 0))),)


max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)
