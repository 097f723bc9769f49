"""The directory of a run: claimed by one process, its JSON files replaced whole."""

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imgcls.errors import CheckpointError, UserError, did_you_mean
from imgcls.parallel import is_main
from imgcls.run.files import lock, write_bytes


@contextlib.contextmanager
def claim(workdir: Path, otherwise: str = "use another --workdir") -> Iterator[None]:
    """Creates the directory and holds its lock, in process 0 for all processes of a run.

    Raises:
        UserError: it is a file, cannot be written, or is in use by another process; the last of
            its remedies is `otherwise`.
    """

    def busy(process: str) -> None:
        raise UserError(
            f"--workdir={workdir} is in use by process {process}: wait for it, stop it, or "
            f"{otherwise}"
        )

    refused = lambda why: (
        f"--workdir={workdir} cannot be used ({why}): name a directory that can be created and "
        "written"
    )
    held = lock(workdir / ".lock", busy=busy, refused=refused)
    with held if is_main() else contextlib.nullcontext():
        yield


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replaces a JSON file whole, unless it is right already. Process 0 writes for all."""
    content = (json.dumps(value, indent=1) + "\n").encode()
    if is_main() and not (path.is_file() and path.read_bytes() == content):
        write_bytes(path, content)


def read_json(path: Path) -> dict[str, Any]:
    try:
        # Values too deep for those who follow them are too deep for `deepcopy`.
        if isinstance(value := copy.deepcopy(json.loads(path.read_bytes())), dict):
            return value
        raise ValueError("it is no JSON object")
    except (FileNotFoundError, NotADirectoryError):
        runs = [p.parent for d in path.parents[:2] for p in d.glob(f"*/{path.name}")]
        near = did_you_mean(path.parent.name, [p.name for p in runs], runs)
        near = near or "--workdir must be the directory of a run"
        raise UserError(f"{path} does not exist: {near}") from None
    except OSError as error:  # which may pass
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): mend the disk") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is broken ({error}): restore it, or train again") from None
