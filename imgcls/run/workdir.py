"""The directory of a run: claimed by one process, its JSON files replaced whole."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imgcls.errors import UserError
from imgcls.parallel import is_main
from imgcls.run.files import lock, write_bytes


@contextlib.contextmanager
def claim(workdir: Path) -> Iterator[None]:
    """Creates the directory and holds its lock, in process 0 for all processes of a run.

    Raises:
        UserError: it is a file, cannot be written, or is in use by another process.
    """

    def busy(process: str) -> None:
        raise UserError(
            f"--workdir={workdir} is in use by process {process}: wait for it, stop it, or use "
            "another --workdir"
        )

    refused = lambda why: (
        f"--workdir={workdir} cannot be used ({why}): name a directory that can be created and "
        "written"
    )
    held = lock(workdir / ".lock", busy=busy, refused=refused)
    with held if is_main() else contextlib.nullcontext():
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
