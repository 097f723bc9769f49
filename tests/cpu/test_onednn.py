"""What is built for a convolution, under which name, and what is known of the library."""

import functools
import re
import tracemalloc
from dataclasses import replace

import jax
import pytest

from imgcls import cpu
from imgcls.cpu import conv, onednn
from tests.cpu.test_kernels import (
    MISSING,
    assert_close,
    convolve,
    lax_convolve,
    normal,
    pull,
    run_python,
)

if MISSING:
    pytest.skip(f"{onednn.DISTRIBUTION} is not installed", allow_module_level=True)
HAS_WINOGRAD = bool(onednn.isa() & onednn.AVX512_CORE)
WINDOW = (1, 1), ((1, 1), (1, 1))  # strides, padding
BASE = onednn.Convolution((2, 4, 4, 4), (3, 3, 4, 4), (2, 4, 4, 4), *WINDOW, "float32")
WORTH_WINOGRAD = replace(BASE, x=(128, 4, 4, 64), w=(3, 3, 64, 64), y=(128, 4, 4, 64))


def test_target_names_hash_the_whole_key(monkeypatch):
    # Not every CPU can build them all, and nothing calls them.
    monkeypatch.setattr(onednn, "build", lambda kind, conv: None)
    monkeypatch.setattr(onednn, "algorithm", lambda kind, conv: "direct")
    monkeypatch.setattr(onednn, "identity", lambda: "nobody's")
    others = [
        {"x": (3, 4, 4, 4), "y": (3, 4, 4, 4)},
        {"w": (3, 3, 4, 8), "y": (2, 4, 4, 8)},
        {"strides": (2, 2), "y": (2, 2, 2, 4)},
        {"padding": ((2, 0), (1, 1))},
        {"dtype": "bfloat16"},
        {"w": (3, 3, 2, 4), "groups": 2},
    ]
    convolutions = [BASE, *(replace(BASE, **change) for change in others)]
    names = [conv.target(kind, c) for kind in onednn.KINDS for c in convolutions]
    assert len(set(names)) == len(names)
    assert names == [conv.target(kind, c) for kind in onednn.KINDS for c in convolutions]
    monkeypatch.setattr(onednn, "algorithm", lambda kind, conv: "winograd")
    assert conv.target("forward", BASE) not in names
    monkeypatch.setattr(onednn, "identity", lambda: "another library's")
    assert conv.target("forward", BASE) not in names


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "padding"),
    [
        ((5, 7, 7, 24), (3, 3, 24, 40), "SAME"),
        ((4, 11, 9, 6), (3, 2, 6, 10), [(1, 2), (0, 1)]),
        ((3, 1, 1, 8), (3, 3, 8, 4), "SAME"),
    ],
    ids=str,
)
@pytest.mark.parametrize("turned", [False, True])
def test_weight_gradients_are_those_of_lax_whichever_way(
    x_shape, w_shape, padding, turned, monkeypatch
):
    ways = {"weight_grad": "turned"} if turned else {}
    monkeypatch.setattr(onednn, "algorithm", lambda kind, _: ways.get(kind, "direct"))
    assert_gives_what_lax_gives(x_shape, w_shape, padding)


def assert_gives_what_lax_gives(x_shape, w_shape, padding):
    x, w = normal(0, *x_shape), normal(1, *w_shape)
    ours, exact = (
        jax.jit(functools.partial(pull, function, padding=padding))(x, w)
        for function in (convolve, lax_convolve)
    )
    assert_close(ours, exact)


@pytest.mark.parametrize(
    ("x_shape", "w_shape"),
    [
        ((5, 8, 8, 32), (3, 3, 32, 64)),
        ((3, 7, 10, 24), (3, 3, 24, 40)),  # no whole tiles, no whole blocks of channels
        ((3, 1, 1, 16), (3, 3, 16, 16)),
        ((40, 8, 8, 256), (3, 3, 256, 256)),  # for many channels oneDNN has other code
    ],
    ids=str,
)
def test_winograd_gives_what_lax_gives(x_shape, w_shape, monkeypatch):
    if not HAS_WINOGRAD:
        pytest.skip("oneDNN has Winograd convolutions with AVX-512 alone")
    monkeypatch.setattr(onednn, "algorithm", lambda kind, _: "winograd")
    assert_gives_what_lax_gives(x_shape, w_shape, "SAME")


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, True),
        ({"w": (3, 3, 24, 64), "x": (128, 4, 4, 24)}, True),
        ({"w": (3, 3, 16, 64), "x": (128, 4, 4, 16)}, False),
        ({"w": (3, 3, 32, 32), "x": (128, 4, 4, 32), "y": (128, 4, 4, 32)}, False),
        ({"x": (120, 4, 4, 64), "y": (120, 4, 4, 64)}, False),  # too few tiles
        ({"x": (131, 4, 4, 64), "y": (131, 4, 4, 64)}, False),  # a prime number of them
        ({"x": (128, 5, 5, 64), "y": (128, 5, 5, 64)}, False),  # tiles of which 25 in 64 are used
        ({"x": (128, 6, 6, 64), "y": (128, 6, 6, 64)}, True),
        ({"x": (0, 4, 4, 64), "y": (0, 4, 4, 64)}, False),
        ({"dtype": "bfloat16"}, False),
        ({"strides": (2, 2), "x": (128, 8, 8, 64)}, False),
        ({"w": (1, 1, 64, 64)}, False),
        ({"w": (3, 3, 32, 64), "groups": 2}, False),
        ({"padding": ((2, 0), (1, 1))}, False),
    ],
    ids=str,
)
def test_winograd_is_for_what_it_makes_faster(change, expected):
    way = onednn.algorithm("forward", replace(WORTH_WINOGRAD, **change))
    assert (way == "winograd") is (expected and HAS_WINOGRAD)


@pytest.mark.parametrize("kind", onednn.KINDS)
def test_winograd_is_used_where_there_is_any_and_memory_for_it(kind, monkeypatch):
    """A weight gradient's scratch memory grows with the threads."""
    assert (onednn.algorithm(kind, WORTH_WINOGRAD) == "winograd") is HAS_WINOGRAD
    monkeypatch.setattr(onednn, "WINOGRAD_BYTES", 0)
    monkeypatch.setattr(onednn, "WINOGRAD_TIMES", 1)
    assert onednn.algorithm(kind, WORTH_WINOGRAD) != "winograd"


def test_what_executions_need_besides_is_shared():
    """Or each of a network's convolutions would hold hundreds of MiB."""
    built = [onednn.build(kind, WORTH_WINOGRAD) for kind in onednn.KINDS]
    tracemalloc.start()  # NumPy's arrays count
    built += [onednn.build(kind, WORTH_WINOGRAD) for kind in onednn.KINDS]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 100_000


@pytest.mark.parametrize(
    "isa, kind, change, expected",
    [
        (0x7, "weight_grad", {}, True),
        (0x27, "weight_grad", {}, False),  # AVX-512 has its own kernels
        (0x3, "weight_grad", {}, False),  # no AVX2
        (0x7, "forward", {}, False),
        (0x7, "weight_grad", {"dtype": "bfloat16"}, False),
        (0x7, "weight_grad", {"strides": (2, 2), "y": (2, 2, 2, 4)}, False),
        (0x7, "weight_grad", {"x": (2, 6, 6, 4), "y": (2, 6, 6, 4)}, False),
        (0x7, "weight_grad", {"w": (3, 3, 4, 2**18), "y": (2, 4, 4, 2**18)}, False),
        (0x7, "weight_grad", {"w": (1, 1, 4, 4)}, False),
        (0x7, "weight_grad", {"w": (3, 3, 2, 4), "groups": 2}, False),
        (0x7, "weight_grad", {"x": (0, 4, 4, 4), "y": (0, 4, 4, 4)}, False),
    ],
)
def test_weight_gradients_are_turned_only_where_that_was_faster(
    isa, kind, change, expected, monkeypatch
):
    monkeypatch.setattr(onednn, "isa", lambda: isa)
    assert (onednn.algorithm(kind, replace(BASE, **change)) == "turned") is expected


@pytest.mark.parametrize("isa, expected", [(0x27, False), (0xE7, True), (0xFEF, True)])
def test_instructions_for_bfloat16_are_known(isa, expected, monkeypatch):
    """AVX-512, the same with bfloat16, and AMX: values of dnnl_cpu_isa_t."""
    monkeypatch.setattr(onednn, "isa", lambda: isa)
    assert cpu.has_bfloat16() is expected


ELSEWHERE = """
import sys
from imgcls.cpu import has_bfloat16, onednn
from imgcls.cpu.conv import why_unavailable
onednn.DISTRIBUTION = sys.argv[1]
print(has_bfloat16(), why_unavailable("float32"))
"""


@pytest.mark.parametrize(
    "wheel, instructions, answer",
    [
        (onednn.DISTRIBUTION, "AVX2", "False None"),
        ("no-such-wheel", "DEFAULT", "False PackageNotFoundError: .*no-such-wheel"),
    ],
)
def test_what_is_asked_for_is_what_there_is(wheel, instructions, answer, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", instructions)
    assert re.match(answer, run_python(ELSEWHERE, wheel).stdout)


def test_identity_names_what_decides_the_bits():
    identity = cpu.identity()
    assert set(identity) == {"onednn", "onednn_isa", "openmp_threads"}
    assert identity["onednn"].startswith("3.") and identity["openmp_threads"] >= 1


def test_the_start_up_check_takes_every_way_that_this_cpu_has():
    def same_size(images, pixels, c, o):
        x, y = (images, pixels, pixels, c), (images, pixels, pixels, o)
        return replace(BASE, x=x, w=(3, 3, c, o), y=y)

    convolutions = [same_size(*case) for stride, *case in conv.CHECKED if stride == 1]
    ways = {onednn.algorithm(kind, c) for kind in onednn.KINDS for c in convolutions}
    turns = onednn.isa() & onednn.AVX2
    assert ways == {"direct"} | ({"winograd"} if HAS_WINOGRAD else {"turned"} if turns else set())
