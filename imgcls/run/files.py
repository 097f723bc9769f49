"""Files that tell what happened: each is replaced whole, or grows by whole lines."""

import atexit
import contextlib
import errno
import fcntl
import functools
import logging
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from imgcls.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the name `path` at the end of the block, unless the block raises.

    A reader, a kill or a power cut finds the old file or the new one, whole. Until then it has a
    name that nobody can guess. A link at `path` is replaced, not followed.

    Raises:
        OSError: the folder or the disk refuses, or `path` is a folder or a device.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "it is not a regular file", str(path))
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        with temporary.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some network file systems cannot
        os.fsync(folder)
    os.close(folder)


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces the content of a file; see `replacing`."""
    with replacing(path) as file:
        file.write(content)


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file, on the disk, and first ends one that a kill tore.

    A link is an OSError.
    """
    with open(path, "a+b", opener=_open_no_link) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _open_no_link(path: str | Path, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


@contextlib.contextmanager
def lock(
    path: Path, *, busy: Callable[[str], None], refused: Callable[[str], str]
) -> Iterator[None]:
    """Holds the lock of a file, which the kernel frees however the process ends.

    Args:
        path: of the file; it and its folder are made where there are none. A link is refused.
        busy: called with the id of a process that holds the lock; raises, or returns to wait.
        refused: the text of the UserError where the file cannot be opened, from the reason.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _open_no_link(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UserError(refused(str(error.strerror))) from None
    with open(descriptor, "rb+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy(file.read(20).decode(errors="replace").strip())
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # some network file systems have no locks
            logging.warning("%s cannot be locked here: use %s once at a time", path, path.parent)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the number
            file.truncate(0)
            file.write(f"{os.getpid()}\n".encode())
        yield


def cache_folder(kind: str) -> Path:
    """Where this user's caches of a kind are, such as "datasets"; made if that is possible.

    Raises UserError where others can write, because compiled programs are code.
    """
    base = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    folder = Path(_temporary() if base.startswith("~") else base, "imgcls", kind)
    for path in (folder.parents[1], folder.parent, folder):
        with contextlib.suppress(OSError):
            path.mkdir(0o700, parents=True, exist_ok=True)
            info, link = path.stat(), path.lstat()
            # A group whose number is its owner's is that user's own. In a sticky folder, such as
            # /tmp, nobody can replace a folder of ours.
            group = stat.S_IWGRP if info.st_gid != info.st_uid else 0
            kept = path == folder.parents[1] and info.st_mode & stat.S_ISVTX
            shared = info.st_mode & (stat.S_IWOTH | group) and not kept
            if shared or not {info.st_uid, link.st_uid} <= {0, os.getuid()}:
                raise UserError(
                    f"others can write to the cache {path}, and programs in it are run: chmod go-w "
                    "it if you trust its content, or name a folder of your own in XDG_CACHE_HOME"
                )
    return folder


@functools.cache
def _temporary() -> str:
    """A private folder that goes with this process."""
    folder = tempfile.mkdtemp(prefix="imgcls-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ.setdefault("MPLCONFIGDIR", folder)
    logging.warning("there is no home directory: caches are in %s until this process ends", folder)
    return folder
