"""What the architectures share."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

ModuleDef = Callable[..., Any]


# On a CPU, XLA's code for bfloat16 goes over memory once more for every operation. What is written
# below therefore computes in float32 and rounds its result.


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """Max-pooling over 2x2 windows without overlap: [B, H, W, C] -> [B, H // 2, W // 2, C].

    The value and gradient of `nn.max_pool(x, (2, 2), (2, 2))`: of equal maxima, the first gets the
    gradient. XLA differentiates that one into a select-and-scatter, several times slower on a CPU,
    and keeps x for it; here the position of each maximum is kept, one byte.
    """
    # Without a gradient (evaluation, exports) Linen's own will do.
    return nn.max_pool(x.astype(jnp.float32), (2, 2), (2, 2)).astype(x.dtype)


def _max_pool_fwd(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    _, h, w, _ = x.shape
    top_left, top_right, low_left, low_right = (
        x[:, i : h // 2 * 2 : 2, j : w // 2 * 2 : 2].astype(jnp.float32)
        for i in (0, 1)
        for j in (0, 1)
    )
    top, low = jnp.maximum(top_left, top_right), jnp.maximum(low_left, low_right)
    position = jnp.where(low > top, 2 + (low_right > low_left), top_right > top_left)
    size = jnp.zeros((0, h, w))  # for its shape alone
    return jnp.maximum(top, low).astype(x.dtype), (position.astype(jnp.uint8), size)


def _max_pool_bwd(residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array]:
    position, (_, height, width) = residuals[0], residuals[1].shape
    enlarge = lambda a: a.repeat(2, axis=1).repeat(2, axis=2)
    _, h, w, _ = grad.shape
    here = 2 * (jnp.arange(2 * h) % 2)[:, None] + jnp.arange(2 * w) % 2
    grad = jnp.where(enlarge(position) == here[None, :, :, None], enlarge(grad), 0)
    return (jnp.pad(grad, ((0, 0), (0, height - 2 * h), (0, width - 2 * w), (0, 0))),)


max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)


@jax.checkpoint  # what its gradient needs is computed again from x, the one thing that is kept
def gelu(x: jax.Array) -> jax.Array:
    """The activation `nn.gelu`."""
    return nn.gelu(x.astype(jnp.float32)).astype(x.dtype)


def channel_sums(*arrays: jax.Array) -> list[jax.Array]:
    """Sums of each of two or more arrays [B, ..., C] over all axes but the last: float32[C].

    Taken together: XLA turns a sum alone into a tree of windows, which on a CPU takes ten times as
    long. First over the rows of each image, which is fastest unless they are many: they do not stay
    in the cache together then, and what each row has comes first.
    """
    zeros = [jnp.float32(0)] * len(arrays)
    add = lambda a, b: [x + y for x, y in zip(a, b)]
    sums = [a.astype(jnp.float32) for a in arrays]
    rows = tuple(range(1, arrays[0].ndim - 2))
    many = math.prod(arrays[0].shape[1:-2]) > 16
    sums = jax.lax.reduce(sums, zeros, add, (arrays[0].ndim - 2,) if many else rows)
    return jax.lax.reduce(sums, zeros, add, tuple(range(sums[0].ndim - 1)))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch normalisation (arXiv 1502.03167) of x [B, ..., C], computed in float32.

    Returns the normalised x in its dtype, and the mean and the (biased) variance, float32[C],
    through which no gradient flows.
    """
    return _batch_norm_fwd(x, scale, bias, epsilon)[0]


def _batch_norm_fwd(x, scale, bias, epsilon):
    count = x.size // x.shape[-1]
    total, squares = channel_sums(x, jnp.square(x.astype(jnp.float32)))
    mean = total / count
    var = jnp.maximum(squares / count - jnp.square(mean), 0)
    inverse = jax.lax.rsqrt(var + epsilon)
    y = ((x - mean) * (inverse * scale) + bias).astype(x.dtype)
    return (y, mean, var), (x, mean, inverse, scale)


def _batch_norm_bwd(_, residuals, grads):
    x, mean, inverse, scale = residuals
    grad, count = grads[0].astype(jnp.float32), x.size // x.shape[-1]
    normalized = (x - mean) * inverse
    bias_grad, scale_grad = channel_sums(grad, grad * normalized)
    x_grad = inverse * scale * (grad - (bias_grad + normalized * scale_grad) / count)
    return x_grad.astype(x.dtype), scale_grad, bias_grad


batch_norm.defvjp(_batch_norm_fwd, _batch_norm_bwd)


class BatchNorm(nn.Module):
    """`nn.BatchNorm` over all axes but the last, with fewer and faster passes on a CPU."""

    use_running_average: bool
    momentum: float = 0.9  # of the running mean and variance
    epsilon: float = 1e-5
    use_scale: bool = True
    scale_init: Callable[..., jax.Array] = nn.initializers.ones
    dtype: jnp.dtype = jnp.float32  # of the result

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = x.shape[-1:]
        scale = self.param("scale", self.scale_init, size) if self.use_scale else jnp.ones(size)
        bias = self.param("bias", nn.initializers.zeros, size)
        mean = self.variable("batch_stats", "mean", jnp.zeros, size)
        var = self.variable("batch_stats", "var", jnp.ones, size)
        x = x.astype(self.dtype)
        if self.use_running_average:
            y = (x - mean.value) * (jax.lax.rsqrt(var.value + self.epsilon) * scale) + bias
            return y.astype(self.dtype)
        y, batch_mean, batch_var = batch_norm(x, scale, bias, self.epsilon)
        if not self.is_initializing():
            step = 1 - self.momentum
            mean.value += step * (batch_mean - mean.value)
            var.value += step * (batch_var - var.value)
        return y
