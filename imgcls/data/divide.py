"""Divides pictures into train, validation and test: what belongs together stays together."""

import contextlib
import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from imgcls.data.images import decode_image, fit_image
from imgcls.errors import BadExampleError, UserError, printable
from imgcls.run import machine
from imgcls.run.logs import progress

Classes = dict[str, list[str]]  # paths below the root of one split, by class
# Pictures whose gray thumbnails have a root mean square difference of up to so many of 255 levels
# are one, in another size or compressed again. Of 400 photographs and their JPEGs of quality 30 to
# 80, or of a half to a quarter of the size, these differed by at most 0.7, others by at least 2.3.
NEAR, SIDE = 1.25, 8
FLAT = 3.0  # a picture without structure, of a lower standard deviation, is near to none


def nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def shuffled(path: str) -> tuple[bytes, str]:
    """Sorting by it shuffles, the same way on any machine and in any listing order."""
    return hashlib.sha256(os.fsencode(nfc(path))).digest(), path


def complete(
    root: str,
    splits: dict[str, Classes],
    validation: str,
    *,
    group: str = "",
    split_duplicates: str = "warn",
) -> tuple[dict[str, Classes], list[str]]:
    """All three splits, and what to say of them; those that are not there are carved from train.

    Args:
        root: the folder that the paths are relative to.
        splits: has train.
        validation: how that is called. It is the test split where there is no other.
        group: a regular expression. Pictures in whose paths it, or its first group, matches the
            same text come into the same of the carved splits.
        split_duplicates: "train" leaves near-duplicates in train, "warn" leaves them alone.
    """
    notes, splits = [], dict(splits)
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
        where = printable(validation)
        notes.append(f"{where} is the test split, validation is a tenth of each class of train")
    carved = [name for name in ("validation", "test") if name not in splits]
    grouped = lambda file: _group(file, group)
    splits |= (
        _carve_groups(splits["train"], carved, grouped) if group else carve(splits["train"], carved)
    )
    if carved and split_duplicates == "train" and (moved := _reunite(root, splits, carved)):
        notes.append(f"{moved:,} near-duplicates are in train, not in another split")
    if group:
        several = Counter(
            key
            for part in splits.values()
            for key in {grouped(f) for fs in part.values() for f in fs}
        )
        if empty := [name for name in carved if not splits[name]]:
            raise UserError(
                f"config.data.group={printable(group)} makes {len(several):,} groups of the "
                f"pictures, too few to leave one for {empty[0]}: name smaller ones"
            )
        torn = sum(n > 1 for n in several.values())
        notes.append(f"{len(several):,} groups, {torn:,} of them in several splits")
    return splits, notes


def carve(train: Classes, held_out: Sequence[str]) -> dict[str, Classes]:
    """Moves a tenth of each class, and at least one file, from train to each held-out split."""
    splits: dict[str, Classes] = {name: {} for name in ("train", *held_out)}
    for label, files in train.items():
        files, tenth = sorted(files, key=shuffled), _tenth(files)
        for name in reversed(held_out if tenth else ()):
            files, splits[name][label] = files[:-tenth], files[-tenth:]
        splits["train"][label] = files
    return splits


def _tenth(files: list[str]) -> int:
    return max(1, (len(files) + 5) // 10) if len(files) >= 3 else 0


def _group(path: str, group: str) -> str:
    found = re.search(group, path)
    return (found[1] or path) if found and found.re.groups else found[0] if found else path


def _carve_groups(
    train: Classes, held_out: Sequence[str], grouped: Callable[[str], str]
) -> dict[str, Classes]:
    """Like `carve`, but moves whole groups, as long as a class lacks a tenth and train has more."""
    members: dict[str, list[tuple[str, str]]] = {}
    for label, files in train.items():
        for file in files:
            members.setdefault(grouped(file), []).append((label, file))
    left = Counter({label: len(files) for label, files in train.items()})
    splits: dict[str, Classes] = {name: {} for name in ("train", *held_out)}
    for name in (*held_out, "train"):
        lacks = {label: _tenth(files) for label, files in train.items()}
        for key in sorted(members, key=shuffled):
            counts = Counter(label for label, _ in members[key])
            fits = all(left[label] > n for label, n in counts.items())
            if name == "train" or (fits and any(lacks[label] > 0 for label in counts)):
                for label, file in members.pop(key):
                    splits[name].setdefault(label, []).append(file)
                    lacks[label], left[label] = lacks[label] - 1, left[label] - 1
    return splits


def thumbnails(images: Iterable[np.ndarray]) -> np.ndarray:
    """float32[N, SIDE * SIDE], the luma of images uint8[h, w, C]."""
    small = [fit_image(image, image_size=(SIDE, SIDE), resize="squash") for image in images]
    luma = [x @ [0.299, 0.587, 0.114] if x.shape[-1] == 3 else x for x in small]
    return np.array([x.ravel() for x in luma], np.float32)


def nearest(these: np.ndarray, those: np.ndarray) -> np.ndarray:
    """int[N]: of each of these thumbnails [N, D] one of those that is near, or -1."""
    found = np.full(len(these), -1)
    squares = np.square(those).sum(axis=1)
    for start in range(0, len(these) if len(those) else 0, 256):
        part = these[start : start + 256]
        distances = np.square(part).sum(axis=1)[:, None] + squares - 2 * part @ those.T
        best = distances.argmin(axis=1)
        near = distances[np.arange(len(part)), best] <= NEAR**2 * part.shape[1]
        found[start : start + 256] = np.where(near & (part.std(axis=1) > FLAT), best, -1)
    return found


def _reunite(root: str, splits: dict[str, Classes], carved: list[str]) -> int:
    """Moves near-duplicates of other splits from the carved ones to train. Returns how many."""

    def thumbnail(path: str) -> np.ndarray | None:
        bar.update()
        with contextlib.suppress(BadExampleError):
            return thumbnails([decode_image(os.path.join(root, path), channels=3)])[0]
        return None

    files = [(s, k, f) for s in ("train", *carved) for k, fs in splits[s].items() for f in fs]
    comparing = progress(len(files), "comparing", "pictures")
    with comparing as bar, ThreadPoolExecutor(machine.cpu_cores()) as executor:
        found = list(executor.map(thumbnail, [path for *_, path in files]))
    files = [file for file, one in zip(files, found) if one is not None]
    if not files:
        return 0
    small = np.array([one for one in found if one is not None])
    split = np.array([name for name, *_ in files])
    total = 0
    while True:
        moved = set()
        for name in carved:
            rows = np.flatnonzero(split == name)
            moved |= set(rows[nearest(small[rows], small[split != name]) >= 0].tolist())
        for row in moved:
            _, label, file = files[row]
            splits[split[row]][label].remove(file)
            splits["train"].setdefault(label, []).append(file)
            split[row] = "train"
        total += len(moved)
        if not moved:
            return total
