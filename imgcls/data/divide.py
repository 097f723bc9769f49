"""Divides pictures into train, validation and test: what belongs together stays together."""

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from imgcls.data import cache
from imgcls.data.images import fit_image
from imgcls.errors import UserError, printable

Classes = dict[str, list[str]]  # paths below the root of one split, by class
Splits = dict[str, Classes]
Open = Callable[[Classes], Any]  # gives a source of these pictures
# Pictures whose gray thumbnails have a root mean square difference of up to so many of 255 levels
# are one, in another size or compressed again. Of 400 photographs and their JPEGs of quality 30 to
# 80, or of a half to a quarter of the size, these differed by at most 0.7, others by at least 2.3.
NEAR, SIDE = 1.25, 8
FLAT = 3.0  # a picture without structure, of a lower standard deviation, is near to its equal alone


def nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def shuffled(path: str) -> tuple[bytes, str]:
    """Sorting by it shuffles, the same way on any machine and in any listing order."""
    return hashlib.sha256(os.fsencode(nfc(path))).digest(), path


def complete(
    splits: Splits, validation: str, read: Open, *, group: str = "", split_duplicates: str = "warn"
) -> tuple[Splits, list[str]]:
    """All three splits, and what to say of them; those that are not there are carved from train.

    Args:
        splits: has train.
        validation: how that is called. It is the test split where there is no other.
        read: gives a source of pictures.
        group: a regular expression. Pictures in whose paths it, or its first group, matches the
            same text come into the same of the carved splits.
        split_duplicates: "train" leaves near-duplicates, with their groups, in train; "warn" leaves
            them alone.
    """
    notes, splits = [], dict(splits)
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
        where = printable(validation)
        notes.append(f"{where} is the test split, validation is a tenth of each class of train")
    carved = [name for name in ("validation", "test") if name not in splits]
    own = lambda file: _group(file, group) or file
    splits |= carve(splits["train"], carved, own)
    if group:
        files = [[f for fs in part.values() for f in fs] for part in splits.values()]
        several = Counter(key for part in files for key in {_group(f, group) for f in part} if key)
        if not several or (any(splits["train"].values()) and not all(splits[k] for k in carved)):
            like = printable(next(file for part in files for file in part))
            few = f"{len(several):,} groups, too few to divide, of paths like {like}"
            raise UserError(f"config.data.group={group} makes {few}: correct it")
        torn = sum(n > 1 for n in several.values())
        alone = sum(not _group(f, group) for part in files for f in part)
        notes.append(f"{len(several):,} groups, {torn:,} of them in several splits")
        notes += [f"{alone:,} pictures of no group"] if alone else []
    if carved and split_duplicates == "train" and (moved := _reunite(splits, carved, own, read)):
        notes.append(f"{moved:,} near-duplicates are in train, not in another split")
        if not all(splits[name] for name in carved):
            raise UserError(f"{notes[-1]}, and one is empty: set config.data.split_duplicates=warn")
    return splits, notes


def carve(train: Classes, held_out: Sequence[str], group: Callable[[str], str]) -> Splits:
    """Moves a tenth of each class, and at least one file, from train to each held-out split.

    Groups move whole, as long as a class lacks a tenth and train has more of each.
    """
    members: dict[str, list[tuple[str, str]]] = {}
    for label, files in train.items():
        for file in files:
            members.setdefault(group(file), []).append((label, file))
    left = {label: set(files) for label, files in train.items()}
    splits: Splits = {name: {} for name in held_out}
    for name in reversed(held_out):
        lacks = {k: max(1, (len(x) + 5) // 10) if len(x) > 2 else 0 for k, x in train.items()}
        for key in sorted(members, key=shuffled, reverse=True):
            counts = Counter(label for label, _ in members[key])
            fits = all(len(left[label]) > n for label, n in counts.items())
            if fits and any(lacks[label] > 0 for label in counts):
                for label, file in members.pop(key):
                    splits[name].setdefault(label, []).append(file)
                    left[label].remove(file)
                    lacks[label] -= 1
    return splits | {"train": {label: sorted(files) for label, files in left.items()}}


def _group(path: str, group: str) -> str | None:
    """What a regular expression, or its first group, matches in a path, if anything."""
    found = re.search(group, nfc(path)) if group else None
    return found[min(found.re.groups, 1)] or None if found else None


def thumbnails(images: Iterable[np.ndarray]) -> np.ndarray:
    """float32[N, SIDE * SIDE], the luma of images uint8[h, w, C]."""
    small = [fit_image(image, image_size=(SIDE, SIDE), resize="squash") for image in images]
    luma = [x @ [0.299, 0.587, 0.114] if x.shape[-1] == 3 else x for x in small]
    return np.array([x.ravel() for x in luma], np.float32).reshape(-1, SIDE * SIDE)


def nearest(these: np.ndarray, those: np.ndarray) -> np.ndarray:
    """int[N]: of each of these thumbnails [N, D] one of those that is near or equal, or -1."""
    equal = {row.tobytes(): i for i, row in enumerate(those)}
    found = np.array([equal.get(row.tobytes(), -1) for row in these], int)
    squares = np.square(those).sum(axis=1)
    for start in range(0, len(these) if len(those) else 0, 256):
        part = these[start : start + 256]
        distances = np.square(part).sum(axis=1)[:, None] + squares - 2 * part @ those.T
        best = distances.argmin(axis=1)
        near = distances[np.arange(len(part)), best] <= NEAR**2 * part.shape[1]
        near &= part.std(axis=1) > FLAT
        found[start : start + 256] = np.where(near, best, found[start : start + 256])
    return found


def _reunite(splits: Splits, carved: list[str], group: Callable[[str], str], read: Open) -> int:
    """Moves near-duplicates of other splits, with their groups, from the carved ones to train.

    Returns how many files that are.
    """
    files = [(s, k, f) for s in ("train", *carved) for k, fs in splits[s].items() for f in fs]
    if not files:
        return 0
    files.sort(key=lambda file: shuffled(file[2]))  # as those of the source are
    source = read({"": [file for *_, file in files]})
    how: Any = {"shape": (SIDE, SIDE, 3), "resize": "squash", "skip_bad": len(files)}
    found = cache.load(source, "thumbnails", range(len(files)), **how)
    files, small = [files[i] for i in found.kept], thumbnails(found.images[: len(found.kept)])
    split = np.array([name for name, *_ in files], str)
    total, moved = 0, [-1]
    while moved:
        rows = {name: np.flatnonzero(split == name) for name in carved}
        near = [x[nearest(small[x], small[split != name]) >= 0] for name, x in rows.items()]
        keys = {group(files[row][2]) for row in np.concatenate(near)}
        moved = [i for i, f in enumerate(files) if split[i] != "train" and group(f[2]) in keys]
        total += len(moved)
        for row in moved:
            _, label, file = files[row]
            splits[split[row]][label].remove(file)
            splits["train"].setdefault(label, []).append(file)
            split[row] = "train"
    for name in carved:
        splits[name] = {label: left for label, left in splits[name].items() if left}
    return total
