"""`lax.conv_general_dilated` on the CPU, with the value and both gradients computed by oneDNN."""

import functools
import hashlib
import threading
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from imgcls.cpu import ffi, onednn
from imgcls.cpu.onednn import HWIO, NHWC, Convolution

LAYOUT = lax.ConvDimensionNumbers(NHWC, HWIO, NHWC)
TOLERANCES = {"float32": 1e-5, "bfloat16": 2**-6}  # of the start-up check
# Stride, images, pixels a side, channels in and out of the convolutions that it computes: with
# stride 1 a weight gradient may be turned; the last two are large enough for Winograd, for which
# oneDNN has other code where channels are many.
CHECKED = (1, 2, 4, 16, 32), (2, 2, 4, 16, 32), (1, 32, 8, 24, 64), (1, 128, 4, 256, 256)

_registering = threading.Lock()


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` for images on a CPU; call it where `unavailable` is None.

    lhs [N,H,W,C] (NHWC) and rhs [kh,kw,C,O] (HWIO), both float32 or both bfloat16, give [N,H',W',O]
    in the same dtype. Sums are in float32, whatever `precision` says. It works under jit, grad (not
    jvp), vmap, scan, pmap and shard_map(check_vma=False); where jit partitions the batch
    (NamedSharding), the result is right, but every device computes all of it.

    Raises:
        NotImplementedError: For other layouts or dtypes, dilation, groups or negative padding.
    """
    lhs, rhs, strides = jnp.asarray(lhs), jnp.asarray(rhs), tuple(map(int, window_strides))
    if lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers) != LAYOUT:
        raise NotImplementedError(f"oneDNN convolution: not NHWC and HWIO: {dimension_numbers}")
    factors = *(lhs_dilation or ()), *(rhs_dilation or ()), feature_group_count, batch_group_count
    if set(factors) != {1}:
        raise NotImplementedError("oneDNN convolution: dilation or groups")
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding)
    padding = tuple((int(before), int(after)) for before, after in padding)
    if min(map(min, padding)) < 0:
        raise NotImplementedError(f"oneDNN convolution: negative padding {padding}")
    reference = functools.partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        dimension_numbers=LAYOUT,
        preferred_element_type=preferred_element_type,
    )
    out = jax.eval_shape(reference, lhs, rhs)  # or lax's own errors
    if out.dtype != lhs.dtype or out.dtype.name not in onednn.DTYPES:
        raise NotImplementedError(f"oneDNN convolution: {lhs.dtype} to {out.dtype}")
    conv = Convolution(lhs.shape, rhs.shape, out.shape, strides, padding, out.dtype.name)
    return _conv(conv, lhs, rhs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(conv: Convolution, lhs, rhs):
    return _call("forward", conv, lhs, rhs)


def _conv_fwd(conv: Convolution, lhs, rhs):
    return _conv(conv, lhs, rhs), (lhs, rhs)


def _conv_bwd(conv: Convolution, operands, grad):
    lhs, rhs = operands
    weight_grad = _call("weight_grad", conv, lhs, grad)
    return _call("input_grad", conv, grad, rhs), weight_grad.astype(rhs.dtype)


_conv.defvjp(_conv_fwd, _conv_bwd)


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
def unavailable(dtype: jax.typing.DTypeLike) -> str | None:
    """Why `conv_general_dilated` cannot be used for arrays of `dtype`, or None. Never raises.

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
