"""Decodes a source once, into a file of arrays that later runs map into memory.

An entry of the cache is one file: the arrays of `Decoded`, one after the other, as .npy has them.
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from imgcls.data.images import fit_image
from imgcls.data.sources import Source
from imgcls.errors import BadExampleError, UserError
from imgcls.run import files, machine, signals
from imgcls.run.logs import progress

CACHE_FORMAT = 3  # raise when the entry of an unchanged source would differ
CHUNK = 250  # examples decoded by one task


class Decoded(NamedTuple):
    """The N readable examples of a source, in its order."""

    images: np.ndarray  # uint8[M, H, W, C]: rows from N on are unused
    labels: np.ndarray  # int32[N], or float32[N, K] where a label is a vector
    kept: np.ndarray  # int64[N]: their indices in the source
    digests: np.ndarray  # uint8[N, 32]: see `digest`


def digest(image: np.ndarray, label: np.ndarray) -> bytes:
    """SHA-256 of a decoded example: of its pixels, then its label."""
    return hashlib.sha256(image.tobytes() + label.tobytes()).digest()


def load(
    source: Source, name: str, *, shape: tuple[int, int, int], resize: str, skip_bad: int
) -> Decoded:
    """Maps the decoded examples of a base split into memory, and decodes them first if need be.

    Where the cache cannot be read or written, they stay in memory, with a warning.

    Raises:
        UserError: more than `skip_bad` unreadable examples, or no cache and too little memory.
    """
    key = json.dumps([CACHE_FORMAT, source.fingerprint, shape, resize]).encode()
    path = files.cache_folder("datasets") / f"{name}-{hashlib.sha256(key).hexdigest()[:24]}"
    shape = (len(source), *shape)
    try:
        if (decoded := _read(path, shape)) is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(path) as file:
                decoded = _decode(source, name, _map_new(file, shape), resize, skip_bad)
                for array in decoded[1:]:
                    npy.write_array(file, array)
    except OSError as error:
        logging.warning("cannot cache decoded images in %s (%s)", path.parent, error)
        decoded = _decode(source, name, _in_memory(shape), resize, skip_bad)
    if (bad := len(source) - len(decoded.kept)) > skip_bad:
        raise _too_many_bad(bad, skip_bad, ["see an earlier run's warnings"])
    return decoded


def _read(path: Path, shape: tuple[int, ...]) -> Decoded | None:
    """The entry, its images mapped; None where there is none, or a damaged one."""
    try:
        images = npy.open_memmap(path, "r")
        with path.open("rb") as file:
            file.seek(images.offset + images.nbytes)
            labels, kept, digests = (npy.read_array(file, allow_pickle=False) for _ in range(3))
        lengths = {len(labels), len(kept), len(digests)}
        if (images.shape, images.dtype, len(lengths)) != (shape, np.uint8, 1):
            raise ValueError("arrays of other shapes")
    except FileNotFoundError:
        return None
    except (ValueError, OverflowError) as error:
        logging.warning("%s is damaged (%s): decoding again", path, error)
        return None
    return Decoded(np.asarray(images), labels, kept, digests)


def _map_new(file: BinaryIO, shape: tuple[int, ...]) -> np.ndarray:
    """An array uint8[shape] mapped from a new file, whose position is then the array's end."""
    # Space is reserved, because writing to a mapped file on a full disk would kill the process.
    if math.prod(shape) > shutil.disk_usage(file.name).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    images = npy.open_memmap(file.name, "w+", np.uint8, shape)
    size = file.seek(0, os.SEEK_END)
    if hasattr(os, "posix_fallocate"):  # macOS has none
        os.posix_fallocate(file.fileno(), 0, size)
    return np.asarray(images)


def _in_memory(shape: tuple[int, ...]) -> np.ndarray:
    needed, free = math.prod(shape), machine.free_memory()
    if needed > 0.9 * free:
        raise UserError(
            f"the images need {needed / 2**30:.1f} GiB, but of memory {free / 2**30:.1f} GiB are "
            "free: lower config.data.image_size, or name a larger disk's folder in XDG_CACHE_HOME"
        )
    return np.empty(shape, np.uint8)


def _decode(source: Source, name: str, images: np.ndarray, resize: str, skip_bad: int) -> Decoded:
    """Decodes all examples into `images`; unreadable ones leave no gap."""
    labels: list[Any] = [None] * len(source)
    digests = np.zeros((len(source), 32), np.uint8)
    bad: dict[int, str] = {}  # why, by index

    def decode(indices: range) -> int:
        for i, example in _examples(source, indices):
            signals.poll()
            if isinstance(example, BadExampleError):
                bad[i] = str(example)
                continue
            label = example["label"]
            labels[i] = np.array(label, np.float32 if np.ndim(label) else np.int32)
            images[i] = fit_image(example["image"], image_size=images.shape[1:3], resize=resize)
            digests[i] = np.frombuffer(digest(images[i], labels[i]), np.uint8)
        return len(indices)

    indices = range(len(source))
    chunks = [indices[start : start + CHUNK] for start in indices[::CHUNK]]
    executor = ThreadPoolExecutor(machine.cpu_cores())  # Pillow releases the GIL
    try:
        with progress(len(source), f"decoding {name}", "images") as bar:
            for done in executor.map(decode, chunks):
                bar.update(done)
    finally:
        executor.shutdown(cancel_futures=True)
    reasons = [bad[i] for i in sorted(bad)]
    if len(bad) > skip_bad:
        raise _too_many_bad(len(bad), skip_bad, reasons)
    for reason in reasons:
        logging.warning("skipped: %s", reason)
    kept = np.setdiff1d(indices, [*bad])
    for row, i in enumerate(kept if bad else ()):
        images[row] = images[i]
    return Decoded(images, np.array([labels[i] for i in kept]), kept, digests[kept])


def _examples(source: Source, indices: range) -> Iterator[tuple[int, Any]]:
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


def _too_many_bad(count: int, skip_bad: int, reasons: list[str]) -> UserError:
    shown = "; ".join(reasons[:5]) + (f"; and {len(reasons) - 5} more" if len(reasons) > 5 else "")
    return UserError(
        f"{count} unreadable example(s), config.data.skip_bad allows {skip_bad}: {shown}. "
        f"Mend or remove them, or skip them with --config.data.skip_bad={count}"
    )
