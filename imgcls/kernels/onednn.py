"""Convolutions by oneDNN, called through ctypes on the addresses of dense NHWC and HWIO arrays.

The library is that of the wheel `onednn-cpu-gomp` (Linux, x86-64); the numbers are those of
oneapi/dnnl/dnnl_types.h, version 3.
"""

import ctypes as C
import functools
import importlib.metadata
import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

DISTRIBUTION, LIBRARY = "onednn-cpu-gomp", "libdnnl.so.3"

CPU, IN_ORDER, FORWARD_TRAINING, DIRECT, ANY_LAYOUT, USER_SCRATCHPAD = 1, 1, 64, 1, 1, 1
DTYPES = {"float32": 3, "bfloat16": 2}
SRC, DST, WEIGHTS, SCRATCHPAD = 1, 17, 33, 80
DIFF_SRC, DIFF_DST, DIFF_WEIGHTS = 129, 145, 161
QUERY_WEIGHTS, QUERY_DIFF_WEIGHTS, QUERY_SCRATCHPAD = 131, 132, 136
UNIMPLEMENTED = 3
PAGE = 4096

# The arrays of each kind of computation, operands before the result, and oneDNN's number for each.
KINDS = {
    "forward": {"x": SRC, "w": WEIGHTS, "y": DST},
    "input_grad": {"y": DIFF_DST, "w": WEIGHTS, "x": DIFF_SRC},
    "weight_grad": {"x": SRC, "y": DIFF_DST, "w": DIFF_WEIGHTS},
}
NHWC, HWIO = (0, 3, 1, 2), (3, 2, 0, 1)  # their axes in oneDNN's order: N, C, H, W and O, I, H, W


@dataclass(frozen=True)
class Convolution:
    """x [N,H,W,C] by w [kh,kw,C,O] gives y [N,H',W',O]; gradients have their arrays' shapes."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    y: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # (before, after) of height and of width
    dtype: str  # a key of DTYPES

    def result(self, kind: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of what `kind` computes; weight gradients are given as summed, in float32."""
        *_, role = KINDS[kind]
        return getattr(self, role), "float32" if kind == "weight_grad" else self.dtype


class _Argument(C.Structure):
    _fields_ = [("number", C.c_int), ("memory", C.c_void_p)]


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
        # By default scratch memory belongs to the thread that creates a primitive, but XLA executes
        # on its own.
        self.attr = self.make("primitive_attr_create")
        _check(self.library.dnnl_primitive_attr_set_scratchpad_mode(self.attr, USER_SCRATCHPAD))
        # One execution at a time: they share the temporary memory, and each occupies all cores.
        self.lock = threading.Lock()
        self._buffer = np.empty(0, np.uint8)

    def make(self, function: str, *args) -> C.c_void_p:
        made = C.c_void_p()
        _check(getattr(self.library, f"dnnl_{function}")(C.byref(made), *args))
        return made

    def layout(self, shape: tuple, axes: tuple, dtype: str, dense: bool = True) -> C.c_void_p:
        """Row-major if dense, else for the primitive to choose."""
        dims = _int64s(shape[axis] for axis in axes)
        strides = _int64s(math.prod(shape[axis + 1 :]) for axis in axes)
        how, argument = ("strides", strides) if dense else ("tag", ANY_LAYOUT)
        return self.make(f"memory_desc_create_with_{how}", 4, dims, DTYPES[dtype], argument)

    def query(self, desc: C.c_void_p, what: int) -> C.c_void_p:
        return C.c_void_p(self.library.dnnl_primitive_desc_query_md(desc, what, 0))

    def memory(self, layout: C.c_void_p) -> C.c_void_p:
        return self.make("memory_create", layout, self.engine, None)

    def place(self, memory: C.c_void_p, address: int) -> None:
        _check(self.quick.dnnl_memory_set_data_handle(memory, C.c_void_p(address)))

    def size(self, layout: C.c_void_p) -> int:
        """Bytes, in whole pages."""
        return -(-self.library.dnnl_memory_desc_get_size(layout) // PAGE) * PAGE

    def reserve(self, size: int) -> None:
        """Makes the temporary memory, which begins at the address `temporary`, large enough."""
        with self.lock:
            if self._buffer.size < size + PAGE:
                self._buffer = np.empty(size + PAGE, np.uint8)
                self.temporary = -(-self._buffer.ctypes.data // PAGE) * PAGE


_runtime = functools.cache(_Runtime)


class _Primitive:
    """A primitive, its arguments, and its scratch, `offset` bytes into the temporary memory."""

    def __init__(self, library: C.CDLL, desc: C.c_void_p, arguments: dict, offset: int):
        rt = self.rt = _runtime()
        scratch = rt.query(desc, QUERY_SCRATCHPAD)
        rt.reserve(offset + rt.size(scratch))
        self.library, self.scratch, self.offset = library, rt.memory(scratch), offset
        self.handle = rt.make("primitive_create", desc)
        pairs = [*arguments.items(), (SCRATCHPAD, self.scratch)]
        self.arguments = (_Argument * len(pairs))(*pairs)

    def execute(self) -> None:
        self.rt.place(self.scratch, self.rt.temporary + self.offset)
        arguments = len(self.arguments), self.arguments
        _check(self.library.dnnl_primitive_execute(self.handle, self.rt.stream, *arguments))


def version() -> str:
    """That of the loaded library, such as "3.2.0"."""
    return ".".join(map(str, _runtime().library.dnnl_version()[:3]))


def identity() -> dict[str, str | int]:
    """What decides the bits of a result, besides its operands."""
    library = _runtime().library
    return {
        "onednn": version(),
        "onednn_isa": hex(library.dnnl_get_effective_cpu_isa()),
        "openmp_threads": library.omp_get_max_threads(),
    }


def build(kind: str, conv: Convolution) -> Callable[..., None]:
    """Prepares `kind` of `conv`: a function of the arrays' addresses, in the order of KINDS[kind].

    It may be called from any thread, and from several at once.

    Raises:
        NotImplementedError: oneDNN cannot compute this on this CPU.
    """
    rt = _runtime()
    x, y = (rt.layout(shape, NHWC, conv.dtype) for shape in (conv.x, conv.y))
    w = rt.layout(conv.w, HWIO, conv.result(kind)[1])
    desc = _convolution_desc(kind, conv, x, y)
    memory = {"x": rt.memory(x), "w": rt.memory(w), "y": rt.memory(y)}
    placed = [memory[role] for role in KINDS[kind]]

    # The fast kernels want weights in blocks. These begin the temporary memory, scratch follows.
    blocks = rt.query(desc, QUERY_DIFF_WEIGHTS if kind == "weight_grad" else QUERY_WEIGHTS)
    offset, copies = 0, []
    if not rt.library.dnnl_memory_desc_equal(blocks, w):
        plain, memory["w"], offset = memory["w"], rt.memory(blocks), rt.size(blocks)
        placed.append(memory["w"])
        ends = [(w, plain), (blocks, memory["w"])]
        (source, src), (target, dst) = reversed(ends) if kind == "weight_grad" else ends
        layouts = source, rt.engine, target, rt.engine
        copy = rt.make("reorder_primitive_desc_create", *layouts, rt.attr)
        copies.append(_Primitive(rt.quick, copy, {SRC: src, DST: dst}, offset))
    arguments = {number: memory[role] for role, number in KINDS[kind].items()}
    convolution = _Primitive(rt.library, desc, arguments, offset)
    steps = [convolution, *copies] if kind == "weight_grad" else [*copies, convolution]

    def run(*addresses: int) -> None:
        with rt.lock:
            for where, address in zip(placed, (*addresses, rt.temporary)):
                rt.place(where, address)
            for step in steps:
                step.execute()

    return run


def _convolution_desc(kind: str, conv: Convolution, x: C.c_void_p, y: C.c_void_p) -> C.c_void_p:
    rt = _runtime()
    before, after = zip(*conv.padding)
    window = _int64s(conv.strides), _int64s((0, 0)), _int64s(before), _int64s(after)

    def make(name, *layouts):
        return rt.make(f"convolution_{name}_primitive_desc_create", rt.engine, *layouts, rt.attr)

    w = rt.layout(conv.w, HWIO, conv.dtype, dense=False)
    forward = make("forward", FORWARD_TRAINING, DIRECT, x, w, None, y, *window)
    if kind == "forward":
        return forward
    if kind == "input_grad":
        return make("backward_data", DIRECT, x, w, y, *window, forward)
    w = rt.layout(conv.w, HWIO, "float32", dense=False)
    return make("backward_weights", DIRECT, x, w, None, y, *window, forward)


def _int64s(values: Iterable[int]) -> C.Array:
    values = tuple(values)
    return (C.c_int64 * len(values))(*values)


def _check(status: int) -> None:
    if status == UNIMPLEMENTED:
        raise NotImplementedError("oneDNN has no such operation on this CPU")
    if status:
        raise RuntimeError(f"oneDNN failed with status {status} of dnnl_status_t")


def _library_path() -> str:
    for file in importlib.metadata.files(DISTRIBUTION) or ():
        if file.name == LIBRARY:
            return str(file.locate())
    raise FileNotFoundError(f"{LIBRARY} is not among the files of the package {DISTRIBUTION}")
