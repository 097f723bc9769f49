"""The oneDNN convolution is lax's, under every transformation, on any thread and device."""

import functools
import importlib.metadata
import subprocess
import sys
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from imgcls import cpu
from imgcls.cpu import conv, ffi, onednn

try:
    importlib.metadata.version(onednn.DISTRIBUTION)
except importlib.metadata.PackageNotFoundError:
    pytest.skip(f"{onednn.DISTRIBUTION} is not installed", allow_module_level=True)

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
    "one value": ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1), "VALID"),
    "no image": ((0, 4, 4, 8), (3, 3, 8, 8), (1, 1), "SAME"),
}


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    reason = cpu.unavailable(request.param)
    if reason and "NotImplementedError" in reason:
        pytest.skip(reason)
    return jnp.dtype(request.param)


def convolve(x, w, strides=(1, 1), padding="SAME", function=cpu.conv_general_dilated):
    return function(x, w, strides, padding, dimension_numbers=LAYOUT)


lax_convolve = functools.partial(convolve, function=lax.conv_general_dilated)


def normal(seed, *shape, dtype=jnp.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def pull(function, x, w, strides=(1, 1), padding="SAME"):
    """Value and both gradients, for an incoming gradient that differs everywhere."""
    value, vjp = jax.vjp(lambda x, w: function(x, w, strides, padding), x, w)
    return value, *vjp(jnp.asarray(normal(2, *value.shape, dtype=value.dtype)))


def assert_close(ours, theirs, dtype="float32"):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCES[dtype] * np.abs(b).max(initial=0))


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
    assert_close(ours, exact, dtype.name)


def test_weight_gradients_are_summed_and_given_in_float32(dtype):
    shape = (4, 31, 31, 1)
    pointwise = onednn.Convolution(
        x=shape,
        w=(1, 1, 1, 1),
        y=shape,
        strides=(1, 1),
        padding=((0, 0), (0, 0)),
        dtype=dtype.name,
    )
    name = conv.target("weight_grad", pointwise)
    result = jax.ShapeDtypeStruct(*pointwise.result("weight_grad"))
    total = jax.ffi.ffi_call(name, result)(jnp.ones(shape, dtype), jnp.ones(shape, dtype))
    assert total.item() == 4 * 31 * 31  # bfloat16 has 3840 and 3856, and a sum in it stops at 256


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({}, (9, 9, 3)),
        ({"strides": 2}, (2, 9, 9, 3)),
        ({"padding": 1}, (2, 1, 9, 9, 3)),
        ({"padding": "CIRCULAR"}, (2, 9, 9, 3)),
    ],
    ids=str,
)
def test_takes_what_linen_passes(settings, shape):
    x = normal(0, *shape)
    layer = functools.partial(nn.Conv, 8, (3, 3), **settings)
    expected, variables = layer().init_with_output(jax.random.key(0), x)
    ours = layer(conv_general_dilated=cpu.conv_general_dilated).apply(variables, x)
    assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
    assert_close(ours, expected)


@pytest.mark.parametrize(
    "change",
    [
        {"dimension_numbers": None},
        {"dimension_numbers": ("NHWC", "OIHW", "NHWC"), "rhs": (4, 4, 3, 3)},
        {"dimension_numbers": ("NHC", "HIO", "NHC"), "lhs": (2, 8, 4), "rhs": (3, 4, 4)},
        {"lhs_dilation": (2, 2)},
        {"rhs_dilation": (1, 2)},
        {"feature_group_count": 2, "rhs": (3, 3, 2, 4)},
        {"batch_group_count": 2},
        {"padding": [(0, 0), (-1, 2)]},
        {"preferred_element_type": jnp.float32, "dtype": jnp.bfloat16},
        {"dtype": jnp.float16},
    ],
    ids=str,
)
def test_refuses_what_no_model_uses(change):
    arguments = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": LAYOUT, **change}
    dtype = arguments.pop("dtype", jnp.float32)
    lhs = jnp.ones(arguments.pop("lhs", (2, 8, 8, 4)), dtype)
    rhs = jnp.ones(arguments.pop("rhs", (3, 3, 4, 4)), dtype)
    if len(lhs.shape) == 3:
        arguments["window_strides"] = (1,)
    with pytest.raises(NotImplementedError, match="oneDNN convolution: "):
        cpu.conv_general_dilated(lhs, rhs, **arguments)


def test_refuses_what_lax_refuses():
    with pytest.raises(ValueError, match="feature dimension"):
        convolve(jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 5, 4)))
    with pytest.raises(TypeError, match="dtype"):
        convolve(jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 4), jnp.bfloat16))


def test_vmap():
    x, w = normal(0, 3, 2, 8, 8, 4), normal(1, 3, 3, 3, 4, 8)
    for axes in ((0, 0), (0, None), (None, 0)):
        operands = [a if axis == 0 else a[0] for a, axis in zip((x, w), axes)]
        ours, theirs = (
            jax.vmap(functools.partial(pull, function), in_axes=axes)(*operands)
            for function in (convolve, lax_convolve)
        )
        assert_close(ours, theirs)


def test_scan_and_its_gradient():
    x, ws = normal(0, 2, 8, 8, 4), 0.2 * normal(1, 3, 3, 3, 4, 4)

    def loss(function, x, ws):
        x, _ = lax.scan(lambda x, w: (jnp.tanh(function(x, w)), None), x, ws)
        return (x**2).sum()

    ours, theirs = (
        jax.jit(jax.grad(functools.partial(loss, function), argnums=(0, 1)))(x, ws)
        for function in (convolve, lax_convolve)
    )
    assert_close(ours, theirs)


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
    expected, found = [step(x, w) for x in xs], {}

    def work(index):
        found[index] = [jax.block_until_ready(step(xs[index], w)) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, results in found.items():
        for result in results:
            assert_same_bits(result, expected[index])
    assert len(found) == len(xs)


def test_several_threads_trace_the_same_new_convolutions():
    sizes, barrier, found = range(20, 30), threading.Barrier(6, timeout=30), []

    def work():
        for size in sizes:
            barrier.wait()
            found.append(convolve(jnp.ones((1, size, 5, 1)), jnp.ones((1, 1, 1, 1))).sum().item())

    threads = [threading.Thread(target=work) for _ in range(barrier.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted([5.0 * size for size in sizes] * barrier.parties)


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
        cpu.unavailable.cache_clear()
        return cpu.unavailable(dtype)

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
        with monkeypatch.context() as patch:
            patch.setattr(onednn, "DISTRIBUTION", "no-such-wheel")
            patch.setattr(onednn, "_runtime", onednn._runtime.__wrapped__)
            assert "no-such-wheel" in reason()
    finally:
        cpu.unavailable.cache_clear()
