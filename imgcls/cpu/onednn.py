"""Convolutions by oneDNN, called through ctypes on the addresses of dense NHWC and HWIO arrays.

The library is that of the wheel `onednn-cpu-gomp` (Linux, x86-64); the numbers are those of
oneapi/dnnl/dnnl_types.h, version 3. It is held at oneDNN 3.1: with 3.2, Winograd went.
"""

import contextlib
import ctypes as C
import functools
import importlib.metadata
import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

DISTRIBUTION, LIBRARY = "onednn-cpu-gomp", "libdnnl.so.3"

CPU, IN_ORDER, FORWARD_TRAINING, ANY_LAYOUT, USER_SCRATCHPAD = 1, 1, 64, 1, 1
DTYPES = {"float32": 3, "bfloat16": 2}
SRC, DST, WEIGHTS, SCRATCHPAD = 1, 17, 33, 80
DIFF_SRC, DIFF_DST, DIFF_WEIGHTS = 129, 145, 161
QUERY_SCRATCHPAD = 136
OUT_OF_MEMORY, UNIMPLEMENTED = 1, 3
# The bits of dnnl_cpu_isa_t that these sets add, and later ones contain.
AVX2, AVX512_CORE, AVX512_CORE_BF16 = 0x4, 0x20, 0x80
PAGE = 4096  # what the workspace holds begins on one: some kernels need memory aligned
QUICK_BYTES = 8 * 2**20  # copied before another thread would give the GIL back
# The scratch memory allowed to Winograd: bytes, or if more, times the three arrays.
WINOGRAD_BYTES, WINOGRAD_TIMES = 64 * 2**20, 8
# The largest images and gradients that `_turned_weight_grad` is for.
TURNED_PIXELS, TURNED_BYTES = 5 * 5, 16 * 2**20

# The arrays of each kind of computation, operands before the result, and oneDNN's number for each.
KINDS = {
    "forward": {"x": SRC, "w": WEIGHTS, "y": DST},
    "input_grad": {"y": DIFF_DST, "w": WEIGHTS, "x": DIFF_SRC},
    "weight_grad": {"x": SRC, "y": DIFF_DST, "w": DIFF_WEIGHTS},
}
# The queries for the layouts that a primitive wants them in.
QUERIES = {SRC: 129, DIFF_SRC: 130, WEIGHTS: 131, DIFF_WEIGHTS: 132, DST: 133, DIFF_DST: 134}
ALGORITHMS = {"direct": 1, "winograd": 2}
NHWC, HWIO = (0, 3, 1, 2), (3, 2, 0, 1)  # their axes in oneDNN's order: N, C, H, W and O, I, H, W
HWIGO = (3, 4, 2, 0, 1)  # of weights whose outputs are in groups: G, O, I, H, W


@dataclass(frozen=True)
class Convolution:
    """x [N,H,W,C] by w [kh,kw,C,O] gives y [N,H',W',O]; gradients have their arrays' shapes."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    y: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # (before, after) of height and of width
    dtype: str  # a key of DTYPES
    groups: int = 1  # of channels, each convolved by itself; w is [kh,kw,C/groups,O]

    def array(self, role: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shape of "x", "w" or "y", and its axes in oneDNN's order."""
        if role != "w" or self.groups == 1:
            return getattr(self, role), HWIO if role == "w" else NHWC
        return (*self.w[:3], self.groups, self.w[3] // self.groups), HWIGO

    def result(self, kind: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of what `kind` computes. Weight gradients stay in float32, as summed."""
        *_, role = KINDS[kind]
        return getattr(self, role), "float32" if kind == "weight_grad" else self.dtype


class _Argument(C.Structure):
    _fields_ = [("number", C.c_int), ("memory", C.c_void_p)]


@dataclass(frozen=True)
class _Step:
    run: Callable[[], None]
    scratch: C.c_void_p  # memory of `scratch_size` bytes that it writes and nobody reads
    scratch_size: int


class _Runtime:
    """The loaded library, and what all convolutions of the process share."""

    def __init__(self):
        path = _library_path()
        # Calls through `quick` keep the GIL, as other threads may take 5 ms to give it back.
        self.library, self.quick = C.CDLL(path), C.PyDLL(path)
        self.library.dnnl_version.restype = C.POINTER(C.c_int)
        self.library.dnnl_primitive_desc_query_md.restype = C.c_void_p
        self.library.dnnl_memory_desc_get_size.restype = C.c_size_t
        self.engine = self.make("engine_create", CPU, C.c_size_t(0))
        self.stream = self.make("stream_create", self.engine, IN_ORDER)
        # The library's own scratch memory is that of the thread which creates a primitive, but XLA
        # executes on threads of its own.
        self.attr = self.make("primitive_attr_create")
        _check(self.library.dnnl_primitive_attr_set_scratchpad_mode(self.attr, USER_SCRATCHPAD))
        # One execution at a time: a primitive's memory serves one, and each one occupies all cores.
        self.lock = threading.Lock()
        self.workspace = np.empty(0, np.uint8)  # for what one execution needs besides

    def reserve(self, size: int) -> None:
        """Makes the workspace at least `size` bytes long."""
        with self.lock:
            if len(self.workspace) < size:
                self.workspace = np.empty(0, np.uint8)  # so that there are never two
                self.workspace = np.empty(size, np.uint8)

    def make(self, function: str, *args) -> C.c_void_p:
        made = C.c_void_p()
        _check(getattr(self.library, f"dnnl_{function}")(C.byref(made), *args))
        return made

    def layout(self, shape: tuple, axes: tuple, dtype: str, dense: bool = True) -> C.c_void_p:
        """Row-major if dense, else for the primitive to choose."""
        dims = _int64s(shape[axis] for axis in axes)
        strides = _int64s(math.prod(shape[axis + 1 :]) for axis in axes)
        how, value = ("strides", strides) if dense else ("tag", ANY_LAYOUT)
        return self.make(f"memory_desc_create_with_{how}", len(axes), dims, DTYPES[dtype], value)

    def query(self, desc: C.c_void_p, what: int) -> C.c_void_p:
        return C.c_void_p(self.library.dnnl_primitive_desc_query_md(desc, what, 0))

    def size(self, layout: C.c_void_p) -> int:
        return self.library.dnnl_memory_desc_get_size(layout)

    def memory(self, layout: C.c_void_p) -> C.c_void_p:
        """Without an address as yet."""
        return self.make("memory_create", layout, self.engine, None)

    def set_address(self, memory: C.c_void_p, address: int) -> None:
        _check(self.quick.dnnl_memory_set_data_handle(memory, C.c_void_p(address)))

    def copy(self, source: tuple, target: tuple) -> "_Step":
        """Copies between two pairs of layout and memory."""
        (source, src), (target, dst) = source, target
        layouts = source, self.engine, target, self.engine
        desc = self.make("reorder_primitive_desc_create", *layouts, self.attr)
        quick = self.size(target) <= QUICK_BYTES
        return self.primitive(self.quick if quick else self.library, desc, {SRC: src, DST: dst})

    def primitive(self, library: C.CDLL, desc: C.c_void_p, memories: dict) -> "_Step":
        """Executes `desc`, by a call through `library`, on {number: memory}."""
        layout = self.query(desc, QUERY_SCRATCHPAD)
        scratch = self.memory(layout)
        pairs = [_Argument(*pair) for pair in (*memories.items(), (SCRATCHPAD, scratch))]
        handle, arguments = self.make("primitive_create", desc), (_Argument * len(pairs))(*pairs)
        execute = library.dnnl_primitive_execute
        run = lambda: _check(execute(handle, self.stream, len(arguments), arguments))
        return _Step(run, scratch, self.size(layout))


_runtime = functools.cache(_Runtime)
_threads: int | None = None


def use_threads(number: int) -> None:
    """Sets the number of OpenMP threads of what is built from now on."""
    global _threads
    _threads = number


def _set_threads() -> int:
    """Their number, set for the calling thread: OpenMP keeps one for each, and XLA has many."""
    threads = identity()["openmp_threads"]
    _runtime().quick.omp_set_num_threads(threads)
    return threads


def isa() -> int:
    """The instructions that this CPU has: bits of dnnl_cpu_isa_t."""
    return _runtime().library.dnnl_get_effective_cpu_isa()


def identity() -> dict[str, Any]:
    """What decides the bits of a result, besides its operands."""
    library = _runtime().library
    return {
        "onednn": ".".join(map(str, library.dnnl_version()[:3])),
        "onednn_isa": hex(isa()),
        "openmp_threads": _threads or library.omp_get_max_threads(),
    }


def has_bfloat16() -> bool:
    """Whether this CPU has instructions for it, and oneDNN is there to use them."""
    try:
        return bool(isa() & AVX512_CORE_BF16)
    except (OSError, AttributeError, importlib.metadata.PackageNotFoundError):
        return False


def build(kind: str, conv: Convolution) -> Callable[..., None]:
    """Prepares `kind` of `conv`: a function of the arrays' addresses, in the order of KINDS[kind].

    It may be called from any thread, and from several at once.

    Raises:
        NotImplementedError: oneDNN cannot compute this on this CPU.
    """
    rt, threads = _runtime(), _set_threads()
    how = algorithm(kind, conv)
    desc, arrays = _turned_weight_grad(conv) if how == "turned" else _as_it_is(kind, conv, how)
    given, used, copies, before, after, size = [], {}, [], [], [], 0
    for number, dense, wanted in arrays:
        given.append(rt.memory(dense))
        used[number] = given[-1]
        if not rt.library.dnnl_memory_desc_equal(dense, wanted):
            used[number] = rt.memory(wanted)
            copies.append((used[number], size))
            size += _whole_pages(rt.size(wanted))
            ends = (dense, given[-1]), (wanted, used[number])
            if number == arrays[-1][0]:
                after.append(rt.copy(*reversed(ends)))
            else:
                before.append(rt.copy(*ends))
    steps = [*before, rt.primitive(rt.library, desc, used), *after]
    rt.reserve(PAGE + size + max(step.scratch_size for step in steps))

    def run(*addresses: int) -> None:
        with rt.lock:
            # With more threads than when it was built, it would write past its scratch memory.
            rt.quick.omp_set_num_threads(threads)
            workspace = _whole_pages(rt.workspace.ctypes.data)
            for memory, address in zip(given, addresses, strict=True):
                rt.set_address(memory, address)
            for memory, offset in copies:
                rt.set_address(memory, workspace + offset)
            for step in steps:
                rt.set_address(step.scratch, workspace + size)
                step.run()

    return run


def _as_it_is(kind: str, conv: Convolution, how: str) -> tuple[C.c_void_p, list[tuple]]:
    """A primitive's description, and of each array, the result last, its number, its layout, and
    the layout that the primitive wants: blocks of weights, and for Winograd of all."""
    given = {number: conv.array(role) for role, number in KINDS[kind].items()}
    desc = _convolution_desc(kind, conv, how)
    return desc, _layouts(desc, given, conv.dtype)


def _layouts(desc: C.c_void_p, given: dict[int, tuple], dtype: str) -> list[tuple]:
    rt = _runtime()
    return [
        (
            number,
            rt.layout(shape, axes, "float32" if number == DIFF_WEIGHTS else dtype),
            rt.query(desc, QUERIES[number]),
        )
        for number, (shape, axes) in given.items()
    ]


def algorithm(kind: str, conv: Convolution) -> str:
    """Which way `kind` of `conv` is computed: "direct", "winograd" or "turned"."""
    _set_threads()
    if _turns(kind, conv):
        return "turned"
    if _suits_winograd(conv):
        with contextlib.suppress(NotImplementedError):
            rt, desc = _runtime(), _convolution_desc(kind, conv, "winograd")
            arrays = 4 * sum(map(math.prod, (conv.x, conv.w, conv.y)))
            # That of a weight gradient has a transformed kernel for every thread.
            scratch = rt.size(rt.query(desc, QUERY_SCRATCHPAD))
            if scratch <= max(WINOGRAD_BYTES, WINOGRAD_TIMES * arrays):
                return "winograd"
    return "direct"


def _suits_winograd(conv: Convolution) -> bool:
    """Whether F(4x4, 3x3) (arXiv 1509.09308) is faster, where oneDNN has it: with AVX-512.

    It needs a quarter of the multiplications, but copies images to blocks of 16 channels and back,
    transforms them and the kernel, and computes whole tiles of 4x4 pixels. So it takes many
    channels, many tiles, and tiles that the images fill (measured: docs/cpu.md). Padded
    on one side alone, its input gradient is wrong (oneDNN 3.1): only "SAME" is left to it.
    """
    images, height, width, _ = conv.y
    tiles = images * -(-height // 4) * -(-width // 4)
    blocks = any(tiles % block == 0 for block in range(8, 32))  # of tiles, kept in registers
    return (
        (conv.dtype, conv.groups) == ("float32", 1)
        and conv.w[:2] == (3, 3)
        and conv.strides == (1, 1)
        and conv.padding == ((1, 1), (1, 1))
        and min(conv.w[2:]) >= 24
        and max(conv.w[2:]) >= 64
        and tiles >= 128
        and blocks
        and images * height * width > tiles * 16 / 2
    )


def _turns(kind: str, conv: Convolution) -> bool:
    """Whether `_turned_weight_grad` is faster: on an AMD EPYC without AVX-512 1.2 to 2.9 times.

    With 16 channels it made no difference. On larger images it was slower, and with larger
    gradients, which have to stay in the cache: every channel of x reads them anew
    (docs/cpu.md). With AVX-512, where oneDNN has its newer kernels for weight gradients,
    too, it was not tried.
    """
    height, width = conv.x[1:3]
    return (
        kind == "weight_grad"
        and isa() & (AVX2 | AVX512_CORE) == AVX2
        and (conv.dtype, conv.groups) == ("float32", 1)
        and conv.strides == (1, 1)
        and height * width <= TURNED_PIXELS
        and 4 * math.prod(conv.y) <= TURNED_BYTES
        and conv.w[:2] != (1, 1)
        and 0 not in (*conv.x, *conv.y)
    )


def _turned_weight_grad(conv: Convolution) -> tuple[C.c_void_p, list[tuple]]:
    """The weight gradient as a forward convolution, for which oneDNN has faster kernels.

    dw[i, j, c, o] = sum over n, h, w of x[n, h + i, w + j, c] dy[n, h, w, o] is what convolving x
    with dy gives, if c counts the images and n the channels. As `_as_it_is`.
    """
    (n, h, w, c), (_, out_h, out_w, o) = conv.x, conv.y
    turned = replace(conv, x=(c, h, w, n), w=(out_h, out_w, n, o), y=(c, *conv.w[:2], o))
    channel_first, input_first = (3, 0, 1, 2), (2, 3, 0, 1)
    given = {
        SRC: (conv.x, channel_first),
        WEIGHTS: (conv.y, channel_first),
        DST: (conv.w, input_first),
    }
    desc = _convolution_desc("forward", turned, "direct")
    return desc, _layouts(desc, given, conv.dtype)


def _convolution_desc(kind: str, conv: Convolution, how: str) -> C.c_void_p:
    rt, number = _runtime(), ALGORITHMS[how]
    before, after = zip(*conv.padding)
    window = _int64s(conv.strides), _int64s((0, 0)), _int64s(before), _int64s(after)

    def make(name, *layouts):
        return rt.make(f"convolution_{name}_primitive_desc_create", rt.engine, *layouts, rt.attr)

    x, y = (rt.layout(shape, NHWC, conv.dtype, how == "direct") for shape in (conv.x, conv.y))
    w = rt.layout(*conv.array("w"), conv.dtype, dense=False)
    forward = make("forward", FORWARD_TRAINING, number, x, w, None, y, *window)
    if kind == "forward":
        return forward
    if kind == "input_grad":
        return make("backward_data", number, x, w, y, *window, forward)
    w = rt.layout(*conv.array("w"), "float32", dense=False)
    return make("backward_weights", number, x, w, None, y, *window, forward)


def _whole_pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _int64s(values: Iterable[int]) -> C.Array:
    values = tuple(values)
    return (C.c_int64 * len(values))(*values)


def _check(status: int) -> None:
    if status == UNIMPLEMENTED:
        raise NotImplementedError("oneDNN has no such operation on this CPU")
    if status == OUT_OF_MEMORY:
        raise MemoryError("oneDNN is out of memory")
    if status:
        raise RuntimeError(f"oneDNN failed with status {status} of dnnl_status_t")


def _library_path() -> str:
    for file in importlib.metadata.files(DISTRIBUTION) or ():
        if file.name == LIBRARY:
            return str(file.locate())
    raise FileNotFoundError(f"{LIBRARY} is not among the files of the package {DISTRIBUTION}")
