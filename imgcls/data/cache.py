"""Decodes a part of a source once, into a file of arrays that later runs map into memory.

An entry of the cache is one file: the bytes of the images, the other arrays of `Decoded` as .npy
has them, and a hash of it all. The hash of what it was decoded from is its name.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from numpy.lib import format as npy

from imgcls.data.images import DECODER, fit_image
from imgcls.errors import BadExampleError, UserError
from imgcls.run import files, machine, signals
from imgcls.run.logs import progress

CACHE_FORMAT = 4  # raise when the entry of an unchanged source would differ
CACHE_BYTES = 20 * 2**30  # of all entries; the least recently used go first
CHUNK = 250  # examples decoded by one task
BLOCK = 2**22  # bytes hashed at a time


class Source(Protocol):
    """One split of a dataset, read in any order and from any thread.

    `source[i]` is {"image": uint8[h, w, channels], "label": int}, or raises BadExampleError. A
    source that reads many examples faster than one by one also has `read(indices) -> iterable
    of examples`, which raises at the first bad one. One that found something to say of its
    examples before training has `describe() -> lines`.
    """

    class_names: tuple[str, ...]  # of each label
    fingerprint: str  # changes whenever the decoded examples may have changed
    ids: Sequence[str] | range  # printable and unique: paths below the folder, or indices

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class Decoded(NamedTuple):
    """The N readable examples of a part of a source, in its order."""

    images: np.ndarray  # uint8[M, H, W, C]: rows from N on are unused
    labels: np.ndarray  # int32[N], or float32[N, K] where a label is a vector
    kept: np.ndarray  # int64[N]: their indices in the source
    digests: np.ndarray  # uint8[N, 32]: see `digest`


def digest(image: np.ndarray, label: np.ndarray) -> bytes:
    """SHA-256 of a decoded example: of its pixels, then its label."""
    return hashlib.sha256(image.tobytes() + label.tobytes()).digest()


def load(
    source: Source, name: str, part: range, *, shape: tuple[int, ...], resize: str, skip_bad: int
) -> Decoded:
    """Maps decoded examples of a base split into memory, and decodes them first if need be.

    Unreadable examples are read again each time. Where the cache cannot be read or written, the
    examples stay in memory, with a warning.

    Raises:
        UserError: more than `skip_bad` unreadable examples, or no cache and too little memory.
    """
    folder = files.cache_folder("datasets")
    shape = (len(part), *shape)
    decode = lambda images: _decode(source, name, part, images, resize)
    try:
        what = [CACHE_FORMAT, DECODER, source.fingerprint, part.start, shape, resize]
        key = hashlib.sha256(json.dumps(what).encode()).digest()
        path = folder / f"{name}-{key.hex()[:24]}"
        if decoded := _read(path, key, shape):
            missing = np.setdiff1d(part, decoded.kept).tolist()
            errors = {i: e for i, e in _examples(source, missing) if isinstance(e, BadExampleError)}
            if len(errors) == len(missing):
                _skip(errors, skip_bad)
                return decoded
        make_room(folder, math.prod(shape))
        with files.replacing(path) as file:
            with contextlib.suppress(OSError):  # not all file systems have permissions and locks
                os.fchmod(file.fileno(), 0o600)
                fcntl.flock(file, fcntl.LOCK_EX)
            decoded, errors = decode(_map_new(file, shape))
            for array in decoded[1:]:
                npy.write_array(file, array)
            file.flush()
            file.write(_hash(key, file, file.tell()))
        _skip(errors, skip_bad)  # what was decoded is kept even if this raises
        return _read(path, key, shape) or decoded
    except OSError as error:
        logging.warning("cannot cache decoded images in %s (%s)", folder, error)
        decoded, errors = decode(_in_memory(shape, name, part))
        _skip(errors, skip_bad)
        return decoded


def _read(path: Path, key: bytes, shape: tuple[int, ...]) -> Decoded | None:
    """The entry, its images mapped; None where there is none, or one that cannot be trusted.

    It is locked against `make_room` for as long as the images are mapped.
    """
    if not path.exists():
        return None
    at_once = lambda path, flags: os.open(path, flags | os.O_NONBLOCK)  # even a pipe
    with open(path, "rb", opener=at_once) as file:
        stat, end = os.fstat(file.fileno()), file.seek(0, os.SEEK_END) - len(key)
        others = stat.st_uid not in (0, os.geteuid()) or stat.st_mode & 0o022
        if others or end < 0 or _hash(key, file, end) != os.pread(file.fileno(), len(key), end):
            why = "can be written by other users" if others else "is damaged"
            logging.warning("%s %s: decoding again", path, why)
            return None
        with contextlib.suppress(OSError):
            os.utime(file.fileno())
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        images = np.asarray(np.memmap(file, np.uint8, "r", shape=shape))
        file.seek(images.nbytes)
        return Decoded(images, *(npy.read_array(file, allow_pickle=False) for _ in range(3)))


def _hash(key: bytes, file: BinaryIO, size: int) -> bytes:
    """SHA-256 of a key and the first bytes of a file."""
    state = hashlib.sha256(key)
    for start in range(0, size, BLOCK):
        state.update(os.pread(file.fileno(), min(BLOCK, size - start), start))
    return state.digest()


def make_room(folder: Path, needed: int) -> None:
    """Deletes what killed writers left, then the least recently used entries over `CACHE_BYTES`.

    Leaves what a process is writing or has mapped, which is locked.
    """
    with contextlib.suppress(OSError):  # another process deletes, too
        for path in sorted(folder.iterdir(), key=lambda path: -path.stat().st_mtime_ns):
            needed += (size := path.stat().st_size)
            if needed > CACHE_BYTES or path.name.startswith(".tmp-"):
                with contextlib.suppress(OSError), path.open("r+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                    needed -= size


def _map_new(file: BinaryIO, shape: tuple[int, ...]) -> np.ndarray:
    """An array uint8[shape] mapped from a new file, whose position is then the array's end."""
    size = math.prod(shape)
    # Space is reserved, because writing to a mapped file on a full disk would kill the process.
    if size > shutil.disk_usage(file.name).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    images = np.memmap(file, np.uint8, "r+", shape=shape)
    if hasattr(os, "posix_fallocate"):  # macOS has none
        os.posix_fallocate(file.fileno(), 0, size)
    file.seek(size)
    return np.asarray(images)


def _in_memory(shape: tuple[int, ...], name: str, part: range) -> np.ndarray:
    needed, free = math.prod(shape), machine.free_memory()
    if needed > 0.9 * free:
        raise UserError(
            f"the images of {name}[{part.start}:{part.stop}] need {needed / 2**30:.1f} GiB, but of "
            f"memory {free / 2**30:.1f} GiB are free: lower config.data.image_size, take a part, "
            f"such as {name}[:10%], or name a larger disk's folder in XDG_CACHE_HOME"
        )
    return np.empty(shape, np.uint8)


def _decode(
    source: Source, name: str, part: range, images: np.ndarray, resize: str
) -> tuple[Decoded, dict[int, BadExampleError]]:
    """Decodes a part of a source into `images`, without gaps. Returns what is unreadable, too."""
    labels: list[Any] = [None] * len(part)
    digests = np.zeros((len(part), 32), np.uint8)
    bad: dict[int, BadExampleError] = {}

    def decode(indices: range) -> int:
        for i, example in _examples(source, indices):
            signals.poll()
            if isinstance(example, BadExampleError):
                bad[i] = example
                continue
            row, label = i - part.start, example["label"]
            labels[row] = np.array(label, np.float32 if np.ndim(label) else np.int32)
            images[row] = fit_image(example["image"], image_size=images.shape[1:3], resize=resize)
            digests[row] = np.frombuffer(digest(images[row], labels[row]), np.uint8)
        return len(indices)

    chunks = [part[start : start + CHUNK] for start in range(0, len(part), CHUNK)]
    executor = ThreadPoolExecutor(machine.cpu_cores())  # Pillow releases the GIL
    try:
        with progress(len(part), f"decoding {name}", "images") as bar:
            for done in executor.map(decode, chunks):
                bar.update(done)
    finally:
        executor.shutdown(cancel_futures=True)
    kept = np.setdiff1d(part, [*bad])
    rows = kept - part.start
    for row, i in enumerate(rows if bad else ()):
        images[row] = images[i]
    return Decoded(images, np.array([labels[i] for i in rows]), kept, digests[rows]), bad


def _examples(source: Source, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """(index, example or BadExampleError), read together where the source can."""
    if hasattr(source, "read"):
        with contextlib.suppress(BadExampleError):  # one by one, below, tells which
            yield from zip(indices, source.read(indices))
            return
    for i in indices:
        try:
            yield i, source[i]
        except BadExampleError as error:
            yield i, error


def _skip(bad: dict[int, BadExampleError], skip_bad: int) -> None:
    """Says which examples, by index, are left out; raises UserError where they are too many."""
    reasons = [str(bad[i]) for i in sorted(bad)]
    if len(bad) > skip_bad:
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise UserError(
            f"{len(bad)} unreadable example(s), config.data.skip_bad allows {skip_bad}: "
            f"{'; '.join(reasons[:5])}{more}. Repair or remove them, or skip them with "
            f"--config.data.skip_bad={len(bad)}"
        )
    for reason in reasons:
        logging.warning("skipped: %s", reason)
