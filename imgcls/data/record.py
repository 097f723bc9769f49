"""data.npz of a workdir: the examples that its run was trained, validated and tested on."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from imgcls.data.splits import Split
from imgcls.errors import CheckpointError, UserError, first_line
from imgcls.parallel import is_main
from imgcls.run import files


def check(workdir: Path, splits: dict[str, Split]) -> dict[str, np.ndarray]:
    """Returns `Split.identities` of the splits that the run saw; an older run tells of none.

    Raises:
        UserError: one of `splits` is not what the run saw of it.
        CheckpointError: data.npz cannot be read.
    """
    path = workdir / "data.npz"
    try:
        # Read first, because zipfile takes an error of the disk for a damaged file.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            saved = {name: np.ravel(arrays[name]).astype("<u8") for name in arrays}
    except FileNotFoundError:
        return {}
    except Exception as error:  # of a damaged file zipfile, zlib and numpy each have their own
        why = f"{path} cannot be read ({first_line(error)}), which tells whether the data changed"
        remedy = "run again when it can be, restore it, or delete it to take the data as it is"
        raise CheckpointError(f"{why}: {remedy}") from error
    for name in splits.keys() & saved.keys():
        if differs := _difference(name, splits[name], saved[name]):
            raise UserError(
                f"{differs}: restore the data that {workdir} was made with, and the version of "
                "Pillow, or use another --workdir"
            )
    return saved


def keep(workdir: Path, splits: dict[str, Split], *, anew: bool = False) -> None:
    """Adds what the run sees for the first time; with `anew` a new run begins."""
    saved = {} if anew else check(workdir, {})
    if is_main() and splits.keys() - saved.keys():
        with files.replacing(workdir / "data.npz") as file:
            identities: dict[str, Any] = {name: s.identities for name, s in splits.items()}
            np.savez(file, **identities | saved)


def _difference(name: str, split: Split, was: np.ndarray) -> str:
    """Such as "37 of 252 test pictures changed, first cat/0012.jpg"; empty if nothing differs."""
    now = split.identities
    new, gone = ~np.isin(now, was), ~np.isin(was, now)
    if new.any():
        first = str(split.ids[int(new.argmax())]).partition(":")
        size = f" ({len(was)} then, {len(now)} now)" if len(now) != len(was) else ""
        what = f"{name} pictures {'changed' if gone.any() else 'are new'}"
        return f"{new.sum()} of {len(now)} {what}, first {first[2] or first[0]}{size}"
    if gone.any():
        return f"{gone.sum()} of {len(was)} {name} pictures are gone"
    return "" if np.array_equal(now, was) else f"the {name} pictures are in another order"
