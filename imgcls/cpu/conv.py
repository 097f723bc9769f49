"""`lax.conv_general_dilated` on the CPU, with the value and both gradients computed by oneDNN."""

import functools
import hashlib
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from imgcls.cpu import ffi, onednn
from imgcls.cpu.derivatives import differentiable
from imgcls.cpu.onednn import HWIO, NHWC, Convolution

LAYOUT = lax.ConvDimensionNumbers(NHWC, HWIO, NHWC)
USUAL: dict = {"dimension_numbers": LAYOUT, "lhs_dilation": (1, 1), "rhs_dilation": (1, 1)}
USUAL["batch_group_count"] = 1
TOLERANCES = {"float32": 1e-5, "bfloat16": 2**-6}  # of the start-up check
# Stride, images, pixels a side, channels in and out of the convolutions that it computes: with
# stride 1 a weight gradient may be turned; the last two are large enough for Winograd, for which
# oneDNN has other code where channels are many. Groups would cost 0.3 s more at every start.
CHECKED = (1, 2, 4, 16, 32), (2, 2, 4, 16, 32), (1, 32, 8, 24, 64), (1, 128, 4, 256, 256)

_registering = threading.Lock()


def conv_general_dilated(lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated`, by oneDNN where it can; ask `why_unavailable` before.

    oneDNN takes images lhs [N,H,W,C] (NHWC) and kernels rhs [kh,kw,C/groups,O] (HWIO), both float32
    or both bfloat16, and gives [N,H',W',O] in the same dtype. Sums are in float32, whatever
    `precision` says. lax computes everything else: other layouts and dtypes, dilation, groups of
    the batch, negative padding, tangents and second derivatives.

    Where jit partitions the batch (NamedSharding), the result is right, but every device computes
    all of it. Under shard_map it needs check_vma=False.
    """
    exact = lambda lhs, rhs: lax.conv_general_dilated(lhs, rhs, *args, **kwargs)
    program = jax.make_jaxpr(exact)(lhs, rhs)  # or lax's own errors
    (out,), params = program.out_avals, program.eqns[-1].params  # with strides... as numbers
    same = out.dtype == lhs.dtype and out.dtype.name in onednn.DTYPES
    usual = all(params.get(name) == value for name, value in USUAL.items())
    if not same or not usual or min(map(min, params["padding"])) < 0:
        return exact(lhs, rhs)
    how = params["window_strides"], params["padding"], out.dtype.name, params["feature_group_count"]
    conv = Convolution(lhs.shape, rhs.shape, out.shape, *how)
    return _operation(conv)(lhs, rhs)[0]


def dot_general(lhs: jax.Array, rhs: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """`jax.lax.dot_general` as in `nn.Dense`, [..., C] by [C, O], by a convolution of 1x1."""
    x = lhs.reshape(1, -1, 1, lhs.shape[-1])
    y = conv_general_dilated(x, rhs[None, None], (1, 1), "VALID", dimension_numbers=LAYOUT)
    return y.reshape(*lhs.shape[:-1], -1)


@functools.cache
def _operation(conv: Convolution) -> Callable[..., tuple[jax.Array, ...]]:
    def plain(lhs, rhs):
        how = {"dimension_numbers": LAYOUT, "feature_group_count": conv.groups}
        return (lax.conv_general_dilated(lhs, rhs, conv.strides, conv.padding, **how),)

    def backward(operands, _, grad):
        lhs, rhs = operands
        weight_grad = _call("weight_grad", conv, lhs, grad)
        return _call("input_grad", conv, grad, rhs), weight_grad.astype(rhs.dtype)

    return differentiable(plain, lambda *arrays: ((_call("forward", conv, *arrays),), ()), backward)


def _call(kind: str, conv: Convolution, a, b):
    result = jax.ShapeDtypeStruct(*conv.result(kind))
    return jax.ffi.ffi_call(target(kind, conv), result, vmap_method="sequential")(a, b)


def target(kind: str, conv: Convolution) -> str:
    """The FFI target for `kind` (of `onednn.KINDS`) of `conv`, registered if it is new.

    Its name hashes all that it depends on, so that a program from the persistent compilation cache
    finds the right one in any process.
    """
    key = f"{kind} {conv} {onednn.algorithm(kind, conv)} {onednn.identity()}"
    name = f"imgcls_conv_{kind}_{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    with _registering:
        if name not in ffi.handlers:
            ffi.register(name, onednn.build(kind, conv))
    return name


@functools.cache
def why_unavailable(dtype: str) -> str | None:
    """Says why oneDNN cannot convolve arrays of `dtype`; None if it can. Never raises.

    The first call for a dtype compares small convolutions and their gradients with those of lax. It
    starts JAX's backend, so `jax.distributed.initialize` comes before.
    """
    try:
        if (platform := jax.default_backend()) != "cpu":
            return f"it runs on CPUs, not on {platform}"
        name = jnp.dtype(dtype).name
        onednn.identity()  # the likeliest failure, before compiling anything
        for kind, error in zip(onednn.KINDS, _relative_errors(name)):
            if not error < TOLERANCES[name]:  # NaN, too
                return f"{kind} in {name} differs from lax: relative error {error:.0e}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _relative_errors(dtype: str) -> list[jax.Array]:
    """Largest difference from lax over largest value: forward, input gradient, weight gradient.

    The largest of those of CHECKED, which between them take each way of `onednn.algorithm`.
    """

    def value_and_grads(function, stride, x, w, grad):
        window = {"window_strides": (stride,) * 2, "padding": "SAME", "dimension_numbers": LAYOUT}
        value, pull = jax.vjp(functools.partial(function, **window), x, w)
        return [array.astype(jnp.float32) for array in (value, *pull(grad))]

    @jax.jit
    def errors(*operands):
        found = []
        for (stride, *_), arrays in zip(CHECKED, operands):
            ours = value_and_grads(conv_general_dilated, stride, *arrays)
            theirs = value_and_grads(lax.conv_general_dilated, stride, *arrays)
            found.append([jnp.abs(a - b).max() / jnp.abs(b).max() for a, b in zip(ours, theirs)])
        return [jnp.stack(kind).max() for kind in zip(*found)]

    rng = np.random.default_rng(0)

    def arrays(stride, n, pixels, c, o):
        shapes = (n, pixels, pixels, c), (3, 3, c, o), (n, pixels // stride, pixels // stride, o)
        return [rng.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in shapes]

    return errors(*(arrays(*case) for case in CHECKED))
