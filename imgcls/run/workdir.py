"""The directory of a run: claimed by one process, its JSON files replaced whole."""

import contextlib
import errno
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imgcls.errors import UserError
from imgcls.parallel import is_main
from imgcls.run.files import write_bytes


@contextlib.contextmanager
def claim(workdir: Path) -> Iterator[None]:
    """Creates the directory and holds its lock, which the kernel frees however the process ends.

    Process 0 does so for all processes of a run.

    Raises:
        UserError: it is a file, cannot be written, or is in use by another process.
    """
    if not is_main():
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("a+", encoding="ascii")
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be used ({error.strerror}): name a directory that can be "
            "created and written"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"--workdir={workdir} is in use by process {lock.read().strip()}: wait for it, "
                "stop it, or use another --workdir"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
            logging.warning("%s cannot be locked here: start only one run in it", workdir)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replaces a JSON file whole, see `files.replacing`. Process 0 writes for all."""
    if is_main():
        write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: --workdir must be the directory of a run"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it, or train again") from None
