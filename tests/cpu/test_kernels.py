"""The oneDNN convolution is lax's, under every transformation, on any thread and device."""

import functools
import importlib.metadata
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from imgcls import cpu
from imgcls.cpu import conv, ffi, layers, onednn
from imgcls.cpu.conv import conv_general_dilated, why_unavailable

MISSING = not any(importlib.metadata.distributions(name=onednn.DISTRIBUTION))
pytestmark = pytest.mark.skipif(MISSING, reason=f"{onednn.DISTRIBUTION} is not installed")

LAYOUT = ("NHWC", "HWIO", "NHWC")
# Relative to the largest value: float32 sums in another order; bfloat16 has 8 bits.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2**-7}

CASES = {  # x, w, strides, padding
    "3x3": ((2, 8, 8, 16), (3, 3, 16, 32), (1, 1), "SAME"),
    "few channels": ((3, 9, 9, 3), (3, 3, 3, 10), (1, 1), "SAME"),
    "stem": ((2, 20, 20, 3), (7, 7, 3, 16), (2, 2), "SAME"),
    "strided, padded on one side": ((2, 8, 8, 16), (3, 3, 16, 16), (2, 2), "SAME"),
    "strided 1x1": ((2, 8, 8, 16), (1, 1, 16, 32), (2, 2), "SAME"),
    "even kernel": ((2, 8, 8, 3), (2, 2, 3, 24), (1, 1), "VALID"),
    "nothing alike": ((3, 9, 7, 5), (3, 2, 5, 6), (2, 1), [(1, 2), (0, 3)]),
    "padded before": ((2, 8, 8, 4), (3, 3, 4, 4), (2, 2), "SAME_LOWER"),
    "a channel each": ((2, 9, 9, 16), (7, 7, 1, 16), (1, 1), "SAME"),
    "two of a channel, strided": ((2, 8, 9, 6), (3, 3, 1, 12), (2, 2), "SAME"),
    "groups": ((2, 8, 8, 12), (3, 5, 4, 18), (1, 2), [(1, 1), (0, 2)]),
    "one value": ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1), "VALID"),
    "no image": ((0, 4, 4, 8), (3, 3, 8, 8), (1, 1), "SAME"),
}


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    reason = why_unavailable(request.param)
    if reason and "NotImplementedError" in reason:
        pytest.skip(reason)
    return jnp.dtype(request.param)


def convolve(x, w, strides=(1, 1), padding="SAME", function=conv_general_dilated):
    groups = max(1, x.shape[-1] // w.shape[2])
    options = {"dimension_numbers": LAYOUT, "feature_group_count": groups}
    return function(x, w, strides, padding, **options)


lax_convolve = functools.partial(convolve, function=lax.conv_general_dilated)


def normal(seed, *shape, dtype=jnp.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def pull(function, x, w, strides=(1, 1), padding="SAME"):
    """Value and both gradients, for an incoming gradient that differs everywhere."""
    value, vjp = jax.vjp(lambda x, w: function(x, w, strides, padding), x, w)
    return value, *vjp(jnp.asarray(normal(2, *value.shape, dtype=value.dtype)))


def assert_close(ours, theirs, error=TOLERANCES["float32"], least=1e-6):
    """Equal trees of arrays, up to `error` times the largest value of each array, or `least`."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs)):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        atol = error * np.abs(b).max(initial=least)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=str(path))


def assert_same_bits(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_those_of_lax(case, dtype):
    x_shape, w_shape, strides, padding = CASES[case]
    x, w = normal(0, *x_shape, dtype=dtype), normal(1, *w_shape, dtype=dtype)
    ours, exact = (
        jax.jit(functools.partial(pull, function, strides=strides, padding=padding))
        for function in (convolve, lax_convolve)
    )
    ours, exact = ours(x, w), exact(x.astype(np.float32), w.astype(np.float32))
    assert [array.dtype for array in ours] == [dtype] * 3
    assert_close(ours, exact, TOLERANCES[dtype.name])


def test_weight_gradients_are_summed_and_given_in_float32(dtype):
    shape, window = (4, 31, 31, 1), ((1, 1), ((0, 0), (0, 0)))
    pointwise = onednn.Convolution(shape, (1, 1, 1, 1), shape, *window, dtype.name)
    name = conv.target("weight_grad", pointwise)
    result = jax.ShapeDtypeStruct(*pointwise.result("weight_grad"))
    total = jax.ffi.ffi_call(name, result)(jnp.ones(shape, dtype), jnp.ones(shape, dtype))
    assert total.item() == 4 * 31 * 31  # bfloat16 has 3840 and 3856, and a sum in it stops at 256


@pytest.mark.parametrize("shape", [(9, 9, 3), (2, 1, 9, 9, 3)], ids=str)
@pytest.mark.parametrize("padding", ["SAME", 1, "CIRCULAR"])
def test_takes_what_linen_passes(padding, shape):
    x = normal(0, *shape)
    layer = functools.partial(nn.Conv, 8, (3, 3), 2, padding)
    expected, variables = layer().init_with_output(jax.random.key(0), x)
    ours = layer(conv_general_dilated=conv_general_dilated).apply(variables, x)
    assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
    assert_close(ours, expected)


@pytest.mark.parametrize(
    "change",
    [
        {"dimension_numbers": None, "lhs": (2, 4, 8, 8), "rhs": (4, 4, 3, 3)},
        {"dimension_numbers": ("NHWC", "OIHW", "NHWC"), "rhs": (4, 4, 3, 3)},
        {"dimension_numbers": ("NHC", "HIO", "NHC"), "lhs": (2, 8, 4), "rhs": (3, 4, 4)},
        {"lhs_dilation": (2, 2)},
        {"rhs_dilation": (1, 2)},
        {"batch_group_count": 2},
        {"padding": [(0, 0), (-1, 2)]},
        {"preferred_element_type": jnp.float32, "dtype": jnp.bfloat16},
        {"dtype": jnp.float16},
    ],
    ids=str,
)
def test_lax_computes_what_onednn_does_not_take(change):
    given = {"lhs": (2, 8, 8, 4), "rhs": (3, 3, 4, 4), "dtype": jnp.float32} | change
    lhs, rhs = (jnp.ones(given.pop(name), given["dtype"]) for name in ("lhs", "rhs"))
    window = {"window_strides": (1,) * (lhs.ndim - 2), "padding": [(1, 1)] * (lhs.ndim - 2)}
    del given["dtype"]
    ours, theirs = (
        jax.jit(functools.partial(function, **window | {"dimension_numbers": LAYOUT} | given))
        for function in (conv_general_dilated, lax.conv_general_dilated)
    )
    assert ours.lower(lhs, rhs).as_text() == theirs.lower(lhs, rhs).as_text()


def test_refuses_what_lax_refuses():
    with pytest.raises(ValueError, match="feature dimension"):
        convolve(jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 5, 4)))
    with pytest.raises(TypeError, match="dtype"):
        convolve(jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 4), jnp.bfloat16))


def modes(function, args, moves, names=None):
    """What `function` gives under each transformation, of `args` and in the directions `moves`."""
    dot = lambda a, b: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))
    weights = lambda a: jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape)
    loss = lambda args: dot(*(jax.tree.map(f, function(args)) for f in (jnp.sin, weights)))
    grad, pairs = jax.grad(loss), jax.tree.map(lambda *leaves: jnp.stack(leaves), args, moves)
    move = lambda f: lambda args: jax.jvp(f, (args,), (moves,))
    walk = lambda f: lambda pairs: lax.scan(lambda total, x: (total + loss(x), f(x)), 0.0, pairs)
    found = {
        "jvp": lambda: move(function)(args),
        "jvp of grad": lambda: move(grad)(args),
        "grad of grad": lambda: jax.grad(lambda args: dot(grad(args), moves))(args),
        "grad of jvp": lambda: jax.grad(lambda args: move(loss)(args)[1])(args),
        "jvp of jvp": lambda: move(move(loss))(args),
        "vmap of grad": lambda: jax.vmap(grad)(pairs),
        "grad of vmap": lambda: jax.grad(lambda pairs: jax.vmap(loss)(pairs).sum())(pairs),
        "scan of grad": lambda: walk(grad)(pairs),
        "grad of scan": lambda: jax.grad(lambda pairs: walk(loss)(pairs)[0])(pairs),
        "checkpoint": lambda: jax.grad(jax.checkpoint(loss))(args),
    }
    return {name: found[name]() for name in names or found}


POOL = functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
NORMS = layers.BatchNorm, nn.BatchNorm
ATTEND = lambda x: jax.nn.dot_product_attention(x, x[::-1], 2 * x)
LAYERS = {  # ours and Linen's
    "conv": [nn.Conv(8, (3, 3), conv_general_dilated=f) for f in (conv_general_dilated, None)],
    "dense": [nn.Dense(8, dot_general=f) for f in (conv.dot_general, None)],
    "norm": [norm(use_running_average=False, momentum=0.5) for norm in NORMS],
    "pool": [nn.Sequential([f]) for f in (layers.max_pool, POOL)],
    "act": [nn.Sequential([f]) for f in (layers.gelu, nn.gelu)],
    "over_images": [nn.Sequential([f(ATTEND)]) for f in (layers.one_by_one, jax.vmap)],
}


@pytest.mark.parametrize("shape", [(3, 4), (2, 5, 4), (2, 3, 5, 4)], ids=str)
def test_fully_connected_layers_are_linens(shape, dtype):
    x, variables = normal(0, *shape).astype(dtype), {"params": {"kernel": normal(1, 4, 7)}}
    ours, theirs = (
        nn.Dense(7, use_bias=False, dtype=dtype, dot_general=f).apply(variables, x)
        for f in (conv.dot_general, None)
    )
    assert ours.dtype == theirs.dtype
    assert_close(ours, theirs, error=TOLERANCES[dtype.name])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "dense" else ()) for n in LAYERS]
)
def test_every_mode_gives_what_linen_gives(name):
    images = [normal(seed, 3, 5, 6, 4) for seed in (0, 1)]
    rest = LAYERS[name][1].init(jax.random.key(0), images[0])
    shapes = rest.pop("params", {})
    args = [(jax.tree.map(lambda p: normal(2, *p.shape), shapes), x) for x in images]

    def results(layer):
        given = lambda params: {"params": params, **rest}
        function = lambda args: layer.apply(given(args[0]), args[1], mutable=["batch_stats"])
        return jax.jit(functools.partial(modes, function))(*args)

    assert_close(*map(results, LAYERS[name]), error=1e-4)


@pytest.mark.parametrize(
    "shape, settings",
    [
        ((8, 5, 6, 16), {}),
        ((3, 17, 2, 8), {"use_scale": False, "epsilon": 0.1}),
        ((40, 8), {"use_bias": False}),
        ((8, 5, 6, 16), {"use_running_average": True}),
        ((8, 5, 6, 16), {"axis": 1}),
    ],
    ids=str,
)
def test_batch_norm_is_linens_and_so_is_its_gradient(shape, settings, dtype):
    x = (3 * normal(0, *shape) + 2).astype(dtype)

    def results(module):
        layer = module(**{"use_running_average": False, "dtype": dtype} | settings)
        variables = layer.init(jax.random.key(0), x)
        run = lambda x: layer.apply(variables, x, mutable=["batch_stats"])
        y, pull, updated = jax.vjp(run, x, has_aux=True)
        return y, updated, pull(normal(1, *shape).astype(dtype))

    ours, theirs = map(results, NORMS)
    assert [a.dtype for a in jax.tree.leaves(ours)] == [a.dtype for a in jax.tree.leaves(theirs)]
    assert_close(ours, theirs, TOLERANCES[dtype.name])


def test_of_equal_maxima_the_first_gets_the_gradient(dtype):
    x = jax.random.randint(jax.random.key(0), (2, 7, 6, 3), 0, 3).astype(dtype)  # many are equal
    weights = jnp.arange(2 * 3 * 3 * 3, dtype=dtype).reshape(2, 3, 3, 3)
    ours, theirs = (jax.vjp(pool, x) for pool in (layers.max_pool, POOL))
    assert ours[0].dtype == dtype
    assert_same_bits((ours[0], ours[1](weights)), (theirs[0], theirs[1](weights)))


def test_several_devices_at_once_are_one_device():
    devices = jax.device_count()
    x, w = normal(0, devices, 2, 8, 8, 16), normal(1, 3, 3, 16, 32)
    step = functools.partial(pull, convolve)
    ours = jax.pmap(step, in_axes=(0, None))(x, w)
    for device in range(devices):
        assert_same_bits([a[device] for a in ours], list(jax.jit(step)(x[device], w)))


def test_partitioned_by_jit_and_by_shard_map():
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    x, w = normal(0, 8, 8, 8, 16), normal(1, 3, 3, 16, 32)
    batch, replicated = PartitionSpec("data"), PartitionSpec()

    def loss_and_grad(x, w, function=convolve, axis_name=None):
        out = jax.value_and_grad(lambda w: (function(x, w) ** 2).mean())(w)
        return lax.pmean(out, axis_name) if axis_name else out

    expected = jax.jit(functools.partial(loss_and_grad, function=lax_convolve))(x, w)
    shards = jax.device_put(x, NamedSharding(mesh, batch))
    assert_close(jax.jit(loss_and_grad)(shards, w), expected)
    each = functools.partial(loss_and_grad, axis_name="data")
    specs = {"in_specs": (batch, replicated), "out_specs": replicated}
    assert_close(jax.jit(jax.shard_map(each, mesh=mesh, check_vma=False, **specs))(x, w), expected)


@pytest.mark.parametrize("shape", [(2, 8, 8, 16), (32, 8, 8, 32)])  # direct, Winograd
def test_several_threads_at_once(shape):
    w = normal(1, 3, 3, shape[-1], 64)
    xs = [normal(seed, *shape) for seed in range(6)]
    step = jax.jit(functools.partial(pull, convolve))
    expected = [step(x, w) for x in xs]
    work = lambda x: [jax.block_until_ready(step(x, w)) for _ in range(20)]
    with ThreadPoolExecutor(len(xs)) as threads:
        for results, same in zip(threads.map(work, xs), expected, strict=True):
            for result in results:
                assert_same_bits(result, same)


def test_several_threads_trace_the_same_new_convolutions():
    sizes, barrier = range(20, 30), threading.Barrier(6, timeout=30)

    def work(_):
        for size in sizes:
            barrier.wait()
            yield convolve(jnp.ones((1, size, 5, 1)), jnp.ones((1, 1, 1, 1))).sum().item()

    with ThreadPoolExecutor(barrier.parties) as threads:
        found = list(threads.map(lambda i: list(work(i)), range(barrier.parties)))
    assert found == [[5.0 * size for size in sizes]] * barrier.parties


@pytest.mark.parametrize("outputs", [32, 64])  # of 64 in float32, Winograd where there is any
def test_twice_gives_the_same_bits(outputs, dtype):
    x, w = normal(0, 16, 16, 16, 32, dtype=dtype), normal(1, 3, 3, 32, outputs, dtype=dtype)
    step = jax.jit(functools.partial(pull, convolve))
    assert_same_bits(step(x, w), step(x, w))


def test_an_unused_input_gradient_is_not_computed():
    x, w = normal(0, 2, 8, 8, 4), normal(1, 3, 3, 4, 4)

    def program(argnums):
        grad = jax.grad(lambda x, w: convolve(x, w).sum(), argnums)
        return jax.jit(grad).lower(x, w).compile().as_text()

    assert "conv_weight_grad" in program(1) and "conv_input_grad" not in program(1)
    assert "conv_input_grad" in program(0) and "conv_weight_grad" not in program(0)


def test_an_exception_in_a_target_is_an_xla_error():
    def fails(*addresses):
        raise ValueError(f"{len(addresses)} buffers and no idea")

    ffi.register("imgcls_test_fails", fails)
    call = jax.ffi.ffi_call("imgcls_test_fails", jax.ShapeDtypeStruct((4,), jnp.float32))
    for function in (call, jax.jit(lambda x: call(x) + 1)):
        with pytest.raises(jax.errors.JaxRuntimeError, match="ValueError: 2 buffers and no idea"):
            jax.block_until_ready(function(jnp.ones(4)))


def run_python(source: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", source, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


OTHER_XLA = """
import logging, pathlib, sys, jax
from imgcls import cpu
from imgcls.cpu import ffi
logging.basicConfig(level=logging.INFO, format="%(message)s")
known, ffi.api_version = ffi.api_version, lambda: (0, 99)
try:
    ffi.register("imgcls_test_refused", print)
except jax.errors.JaxRuntimeError as error:
    print("0.99" in str(error))
ffi.api_version = known
header = pathlib.Path(sys.argv[1], "xla/ffi/api/c_api.h")
header.parent.mkdir(parents=True)
header.write_text("#define XLA_FFI_API_MAJOR 1\\n\\n#define XLA_FFI_API_MINOR 0\\n")
jax.ffi.include_dir = lambda: sys.argv[1]
print("conv" in cpu.ops("float32"), jax.numpy.arange(4).sum())
"""


def test_another_interface_of_xla_means_plain_convolutions_and_one_line(tmp_path):
    result = run_python(OTHER_XLA, tmp_path)
    assert result.stdout.split() == ["True", "False", "6"], result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "plain XLA" in line]
    assert "is 1.0, not 0.x" in line


SETUP = """
import sys, jax, numpy as np
from imgcls import cpu
def convolve(x, w, strides):
    layout = ("NHWC", "HWIO", "NHWC")
    return cpu.conv_general_dilated(x, w, strides, "SAME", dimension_numbers=layout)
"""

CACHED = """
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.split("/")[-1]))
rng = np.random.default_rng(0)
w, x = (rng.standard_normal(shape).astype("float32") for shape in ((3, 3, 8, 8), (2, 8, 8, 8)))
grad = jax.jit(jax.grad(lambda w: convolve(convolve(x, w, (1, 1)), w, (2, 2)).mean()))(w)
print(events.count("cache_hits"), events.count("cache_misses"), np.asarray(grad).tobytes().hex())
"""


def test_a_cached_program_finds_its_kernels_in_a_new_process(tmp_path):
    first, second = (run_python(SETUP + CACHED, tmp_path) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    (hits, misses, grad), (new_hits, new_misses, new_grad) = (
        first.stdout.split(),
        second.stdout.split(),
    )
    assert (hits, misses) == ("0", "1") and (new_hits, new_misses) == ("1", "0")
    assert grad == new_grad


PENDING = """
@jax.jit
def step(x, w):
    return convolve(convolve(x, w, (1, 1)), w, (1, 1))
x, w = np.zeros((64, 32, 32, 32), "float32"), np.zeros((3, 3, 32, 32), "float32")
for _ in range(10):
    x = step(x, w)
del x
"""


def test_a_process_ends_while_programs_are_pending():
    assert run_python(SETUP + PENDING).returncode == 0


def test_unavailable_says_why_and_never_raises(monkeypatch):
    def reason(dtype="float32"):
        why_unavailable.cache_clear()
        return why_unavailable(dtype)

    try:
        assert reason() is None
        assert "float16" in reason("float16")
        assert "TypeError" in reason("no dtype")
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda: "tpu")
            assert "tpu" in reason()
        with monkeypatch.context() as patch:
            patch.setattr(conv, "TOLERANCES", {"float32": 0.0})
            assert "differs from lax" in reason()
    finally:
        why_unavailable.cache_clear()


def test_without_onednn_the_other_operations_stay(monkeypatch, caplog):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    caplog.set_level("INFO")
    plain = {"norm", "pool", "act", "over_images"}
    assert set(cpu.ops("float32")) == plain | {"conv", "dense"} and not caplog.records
    monkeypatch.setattr(cpu, "why_unavailable", lambda dtype: "no library")
    assert set(cpu.ops("float32")) == plain
    assert caplog.messages == ["convolutions run on plain XLA: no library"]
