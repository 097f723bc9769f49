"""Python functions as XLA FFI targets on the CPU: ctypes takes the place of a compiler.

XLA calls a target with the address of a call frame, which has those of the buffers. The structs are
the beginnings of those in xla/ffi/api/c_api.h (under jax.ffi.include_dir()), which only another
major version may change. They were read in versions 0.1, 0.3 and 0.5.
"""

import atexit
import ctypes as C
import functools
import re
from collections.abc import Callable
from pathlib import Path

import jax

METADATA_EXTENSION, INTERNAL = 1, 13


def _struct(*fields: tuple[str, type]) -> type[C.Structure]:
    return type("Struct", (C.Structure,), {"_fields_": list(fields)})


_EXTENSION = _struct(("size", C.c_size_t), ("type", C.c_int), ("next", C.c_void_p))
_HEAD = ("size", C.c_size_t), ("extension", C.POINTER(_EXTENSION))
_VERSION = _struct(*_HEAD, ("major", C.c_int), ("minor", C.c_int))
_METADATA = _struct(("size", C.c_size_t), ("version", _VERSION))
_METADATA_EXTENSION = _struct(("base", _EXTENSION), ("metadata", C.POINTER(_METADATA)))
_ERROR = _struct(*_HEAD, ("message", C.c_char_p), ("code", C.c_int))
_CREATE_ERROR = C.PYFUNCTYPE(C.c_void_p, C.POINTER(_ERROR))
_API = _struct(*_HEAD, ("version", _VERSION), ("internal", C.c_void_p), ("error", _CREATE_ERROR))
_BUFFER = _struct(*_HEAD, ("dtype", C.c_int), ("address", C.c_void_p))
_ITEMS = C.POINTER(C.POINTER(_BUFFER))
_BUFFERS = _struct(*_HEAD, ("count", C.c_int64), ("types", C.c_void_p), ("items", _ITEMS))
_FRAME = _struct(
    *_HEAD,
    ("api", C.POINTER(_API)),
    ("context", C.c_void_p),
    ("stage", C.c_int),
    ("operands", _BUFFERS),
    ("results", _BUFFERS),
)
_HANDLER = C.CFUNCTYPE(C.c_void_p, C.POINTER(_FRAME))

handlers: dict[str, object] = {}  # XLA holds bare pointers to these, for ever


def register(name: str, run: Callable[..., None]) -> None:
    """Makes `run` the target `name` of `jax.ffi.ffi_call`, once and for the life of the process.

    `run` receives the addresses of the operands, then of the results, on any thread and on several
    at once. Its exception fails the XLA program: a `jax.errors.JaxRuntimeError` with the same text.

    Raises RuntimeError where XLA has another interface, before XLA sees the target.
    """
    version = api_version()
    jax.devices("cpu")  # a backend that starts later fails as a whole if it refuses a target

    def handle(frame) -> int | None:
        frame = frame.contents
        try:
            if frame.extension and frame.extension.contents.type == METADATA_EXTENSION:
                asked = C.cast(frame.extension, C.POINTER(_METADATA_EXTENSION)).contents
                told = asked.metadata.contents.version
                told.major, told.minor = version
            else:
                run(*_addresses(frame.operands), *_addresses(frame.results))
        except BaseException as error:  # ctypes would drop it, and XLA use a result never written
            text = f"{name}: {type(error).__name__}: {error}".encode()
            details = _ERROR(size=C.sizeof(_ERROR), message=text, code=INTERNAL)
            return frame.api.contents.error(details)
        return None

    if not handlers:
        atexit.register(_drain)
    handlers[name] = _HANDLER(handle)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handlers[name]), platform="cpu")


@functools.cache
def api_version() -> tuple[int, int]:
    """The version of the interface that XLA has, from its header."""
    header = Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text()
    numbers = re.findall(r"^#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", header, re.M)
    major, minor = map(int, numbers)
    if major:
        raise RuntimeError(f"XLA's interface for foreign functions is {major}.{minor}, not 0.x")
    return major, minor


def _addresses(buffers) -> list[int]:
    if buffers.size != C.sizeof(_BUFFERS):
        raise RuntimeError("the call frame is of another version of XLA")
    return [buffers.items[i].contents.address for i in range(buffers.count)]


def _drain() -> None:
    """Waits for all dispatched programs: to call Python after its end would hang the process.

    XLA's CPU client runs programs in order: those of a device, and those of several devices.
    """
    devices = jax.local_devices(backend="cpu")
    together = jax.NamedSharding(jax.sharding.Mesh(devices, "devices"), jax.P())
    last = jax.jit(lambda x: x + 1)
    for place in (*devices, together):
        last(jax.device_put(0, place)).block_until_ready()
