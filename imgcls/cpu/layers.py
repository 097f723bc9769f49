"""Pooling, GELU and batch normalisation with fewer passes over memory than XLA's on a CPU.

XLA's code for bfloat16 goes over memory once more for every operation on a CPU. What is written
here therefore computes in float32 and rounds its result.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from imgcls.cpu.derivatives import differentiable


def max_pool(x: jax.Array) -> jax.Array:
    """`nn.max_pool(x, (2, 2), (2, 2))`: [B, H, W, C] -> [B, H // 2, W // 2, C].

    XLA differentiates Linen's into a select-and-scatter, several times slower on a CPU, and keeps x
    for it. Here one byte is kept per maximum: its position.
    """
    return _max_pool(x)[0]


def _max_pool_forward(x):
    _, h, w, _ = x.shape
    top_left, top_right, low_left, low_right = (
        x[:, i : h // 2 * 2 : 2, j : w // 2 * 2 : 2].astype(jnp.float32)
        for i in (0, 1)
        for j in (0, 1)
    )
    top, low = jnp.maximum(top_left, top_right), jnp.maximum(low_left, low_right)
    position = jnp.where(low > top, 2 + (low_right > low_left), top_right > top_left)
    return (jnp.maximum(top, low).astype(x.dtype),), (position.astype(jnp.uint8),)


def _max_pool_backward(arrays, residuals, grad):
    (position,), (_, height, width, _) = residuals, arrays[0].shape
    enlarge = lambda a: a.repeat(2, axis=1).repeat(2, axis=2)
    _, h, w, _ = grad.shape
    here = 2 * (jnp.arange(2 * h) % 2)[:, None] + jnp.arange(2 * w) % 2
    grad = jnp.where(enlarge(position) == here[None, :, :, None], enlarge(grad), 0)
    return (jnp.pad(grad, ((0, 0), (0, height - 2 * h), (0, width - 2 * w), (0, 0))),)


_max_pool = differentiable(
    lambda x: (nn.max_pool(x, (2, 2), (2, 2)),), _max_pool_forward, _max_pool_backward
)


@jax.checkpoint  # its gradient is computed again from x, so that x alone is kept
def gelu(x: jax.Array) -> jax.Array:
    """The activation `nn.gelu`."""
    return nn.gelu(x.astype(jnp.float32)).astype(x.dtype)


def one_by_one(function: Callable) -> Callable:
    """`jax.vmap` for attention: the scores of one image at a time stay in the cache."""
    return functools.partial(jax.lax.map, lambda x: function(x.astype(jnp.float32)).astype(x.dtype))


def channel_sums(*arrays: jax.Array) -> list[jax.Array]:
    """Sums of each of two or more arrays [B, ..., C] over all axes but the last: float32[C].

    All sums are taken in one `lax.reduce`, because XLA lowers a single sum to a tree of windows
    that is 10x slower on a CPU. Rows are reduced first, or columns if an image has more than 16
    rows, so that partial sums stay in the cache.
    """
    zeros = [jnp.float32(0)] * len(arrays)
    add = lambda a, b: [x + y for x, y in zip(a, b)]
    sums = [a.astype(jnp.float32) for a in arrays]
    rows = tuple(range(1, arrays[0].ndim - 2))
    many = math.prod(arrays[0].shape[1:-2]) > 16
    sums = jax.lax.reduce(sums, zeros, add, (arrays[0].ndim - 2,) if many else rows)
    return jax.lax.reduce(sums, zeros, add, tuple(range(sums[0].ndim - 1)))


@functools.cache
def batch_norm(epsilon: float) -> Callable[..., tuple[jax.Array, ...]]:
    """Batch normalisation (arXiv 1502.03167), computed in float32.

    Returns a function of x [B, ..., C], scale [C] and bias [C]. It gives the normalised x in its
    dtype, and the mean and the biased variance, float32[C].
    """

    def normalize(sums, x, scale, bias):
        count = x.size // x.shape[-1]
        total, squares = sums(x, jnp.square(x.astype(jnp.float32)))
        mean = total / count
        var = jnp.maximum(squares / count - jnp.square(mean), 0)
        inverse = jax.lax.rsqrt(var + epsilon)
        y = ((x - mean) * (inverse * scale) + bias).astype(x.dtype)
        return (y, mean, var), (mean, inverse)

    def plain(*arrays):
        sums = lambda *terms: [a.astype(jnp.float32).sum(tuple(range(a.ndim - 1))) for a in terms]
        return normalize(sums, *arrays)[0]

    def backward(arrays, residuals, grad):
        (x, scale, _), (mean, inverse) = arrays, residuals
        grad, count = grad.astype(jnp.float32), x.size // x.shape[-1]
        normalized = (x - mean) * inverse
        bias_grad, scale_grad = channel_sums(grad, grad * normalized)
        x_grad = inverse * scale * (grad - (bias_grad + normalized * scale_grad) / count)
        return x_grad.astype(x.dtype), scale_grad, bias_grad

    return differentiable(plain, functools.partial(normalize, channel_sums), backward)


class BatchNorm(nn.BatchNorm):
    """`nn.BatchNorm`, faster in training over all axes but the last; otherwise Linen's own."""

    @nn.compact
    def __call__(self, x, use_running_average=None, *, mask=None):
        given = self.use_running_average, use_running_average
        names = "axis", "axis_name", "param_dtype", "use_fast_variance", "force_float32_reductions"
        usual = all(getattr(self, name) == getattr(nn.BatchNorm, name) for name in names)
        if nn.merge_param("use_running_average", *given) or mask is not None or not usual:
            return super().__call__(x, use_running_average, mask=mask)
        size = x.shape[-1:]
        scale = self.param("scale", self.scale_init, size) if self.use_scale else jnp.ones(size)
        bias = self.param("bias", self.bias_init, size) if self.use_bias else jnp.zeros(size)
        mean = self.variable("batch_stats", "mean", jnp.zeros, size)
        var = self.variable("batch_stats", "var", jnp.ones, size)
        x = x.astype(self.dtype or jnp.float32)
        y, batch_mean, batch_var = batch_norm(self.epsilon)(x, scale, bias)
        if not self.is_initializing():
            step = 1 - self.momentum
            mean.value += step * (batch_mean - mean.value)
            var.value += step * (batch_var - var.value)
        return y
