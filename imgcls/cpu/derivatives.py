"""Operations with a fast value and gradient, and with every other derivative of a plain definition.

A `custom_vjp` has no forward mode, and a `custom_jvp` no gradient of its own. Here one primitive
stands for the tangents: forward mode evaluates it by `plain`, a gradient transposes it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import zero_from_primal
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Arrays = tuple[jax.Array, ...]


def differentiable(
    plain: Callable[..., Arrays],
    forward: Callable[..., tuple[Arrays, Arrays]],
    backward: Callable[[Arrays, Arrays, jax.Array], Arrays],
) -> Callable[..., Arrays]:
    """A function of arrays with the values of `forward` and the gradient of `backward`.

    Tangents and higher derivatives are those of `plain`. It works under vmap, too.

    Args:
        plain: (*arrays) -> a tuple of outputs; JAX can differentiate it any number of times.
        forward: (*arrays) -> the same outputs, and a tuple of residuals for `backward`.
        backward: (arrays, residuals, cotangent of the first output) -> one gradient per array. A
            gradient through other outputs is computed by `plain`.
    """

    def plain_gradient(arrays, cotangents):
        outputs, pull = jax.vjp(plain, *arrays)
        fill = lambda given, out: jnp.zeros_like(out) if given is None else given
        return pull(tuple(map(fill, cotangents, outputs)))

    @jax.custom_jvp
    def value(*arrays):
        return forward(*arrays)

    @value.defjvp
    def value_jvp(arrays, tangents):
        outputs, residuals = value(*arrays)
        params = {"plain": plain, "gradient": gradient, "count": len(arrays)}
        moved = tangent_p.bind(*arrays, *residuals, *tangents, **params)
        # `plain` is a function of the arrays alone, so that residuals count as constants.
        return (outputs, residuals), (tuple(moved), tuple(map(zero_from_primal, residuals)))

    @jax.custom_jvp
    def gradient(arrays, residuals, cotangents):
        first, *others = cotangents
        if first is None or any(c is not None for c in others):
            return plain_gradient(arrays, cotangents)
        return backward(arrays, residuals, first)

    @gradient.defjvp
    def gradient_jvp(primals, tangents):
        given, moved = ((x[0], x[2]) for x in (primals, tangents))
        return gradient(*primals), jax.jvp(plain_gradient, given, moved)[1]

    return lambda *arrays: value(*arrays)[0]


def _tangent(*flat: jax.Array, plain: Callable[..., Arrays], count: int, **_: Any) -> Arrays:
    """The outputs' tangents; `flat` holds `count` arrays, the residuals, and `count` tangents."""
    return jax.jvp(plain, flat[:count], flat[-count:])[1]


def _abstract(*flat, **params):
    outputs = jax.eval_shape(partial(_tangent, **params), *flat)
    return [jax.core.ShapedArray(out.shape, out.dtype) for out in outputs]


def _jvp(primals, tangents, **params):
    return jax.jvp(partial(_tangent, **params), primals, tuple(map(ad.instantiate_zeros, tangents)))


def _transpose(cotangents, *flat, gradient, count, **_):
    arrays, residuals, tangents = flat[:count], flat[count:-count], flat[-count:]
    cotangents = tuple(None if type(c) is ad.Zero else c for c in cotangents)
    gradients = gradient(arrays, residuals, cotangents)
    asked = [g if ad.is_undefined_primal(t) else None for g, t in zip(gradients, tangents)]
    return [None] * (len(flat) - count) + asked


def _batch(flat, axes, *, plain, gradient, **params):
    size = next(x.shape[axis] for x, axis in zip(flat, axes) if axis is not None)
    flat = [batching.bdim_at_front(x, axis, size) for x, axis in zip(flat, axes)]
    mapped = {"plain": jax.vmap(plain), "gradient": jax.vmap(gradient)}
    moved = tangent_p.bind(*flat, **mapped, **params)
    return moved, [0] * len(moved)


tangent_p = Primitive("tangent")
tangent_p.multiple_results = True
tangent_p.def_impl(_tangent)
tangent_p.def_abstract_eval(_abstract)
mlir.register_lowering(tangent_p, mlir.lower_fun(_tangent, multiple_results=True))
ad.primitive_jvps[tangent_p] = _jvp
ad.primitive_transposes[tangent_p] = _transpose
batching.primitive_batchers[tangent_p] = _batch
