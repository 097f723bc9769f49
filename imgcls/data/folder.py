"""A folder of images: `PATH/<class>/*`, or `PATH/{train,validation,test}/<class>/*`."""

import functools
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imgcls.data.images import decode_image, hash_files
from imgcls.errors import UserError, printable

LAYOUTS = "PATH/<class>/* or PATH/{train,validation,test}/<class>/*"
SPLIT_FOLDERS = {"train": "train", "test": "test"}
SPLIT_FOLDERS |= dict.fromkeys(("validation", "val", "valid"), "validation")
_Entry = os.DirEntry[str]
# What desktops leave in folders; names that start with a dot are ignored too.
IGNORED = ("thumbs.db", "desktop.ini")


_Split = dict[str, list[str]]  # paths below the root, by class


class FolderSource:
    """One split of a folder, in the order of the paths' SHA-256. See `data.sources.Source`."""

    def __init__(self, root: str, split: _Split, classes: list[str], channels: int):
        """Takes the files of each class, and all classes: a label is an index into these."""
        index = {name: label for label, name in enumerate(classes)}
        labels = {file: index[name] for name, files in split.items() for file in files}
        paths = sorted(labels, key=_shuffled)
        self._examples = [(os.path.join(root, path), labels[path]) for path in paths]
        self._channels = channels
        self.class_names = tuple(map(printable, classes))
        self.ids = tuple(map(printable, paths))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the order, the labels and the contents of the files, each of which is read for it."""
        paths, labels = zip(*self._examples)
        return f"image_folder {hash_files(paths, self._channels, labels)}"

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self._examples[index]
        return {"image": decode_image(path, channels=self._channels), "label": label}


def open_folder(
    *, data_dir: str | None, channels: int, follow_links: bool = True, **_: Any
) -> dict[str, FolderSource]:
    """Opens the splits of a folder of images. Labels number the sorted names of class folders.

    A class holds every regular file below its folder, except hidden ones and `IGNORED`. A folder
    `train` with only other splits next to it tells the layout with splits. Validation, and without
    that layout test too, is a tenth of each class of train where there is no folder of it. The
    SHA-256 of a file's path below PATH decides; a class of one or two files stays in train.

    Raises:
        UserError: No such folder, no images, one class, an empty class or split, a class that train
            lacks, a link that makes a loop, any link at all when `follow_links` is False.
    """
    if data_dir is None:
        raise UserError(f"image_folder needs --config.data.dir=PATH, laid out as {LAYOUTS}")
    root = os.path.expanduser(data_dir)
    shown = printable(root)
    if not os.path.isdir(root):
        raise UserError(f"{shown} is not a directory; name one with --config.data.dir")
    folders = sorted(entry.name for entry in scan(root, follow_links)[0])
    list_classes = lambda folder: _list_classes(os.path.join(root, folder), root, follow_links)
    if "train" in folders and set(folders) <= set(SPLIT_FOLDERS):
        splits = {SPLIT_FOLDERS[folder]: list_classes(folder) for folder in folders}
        if len(splits) < len(folders):
            raise UserError(f"{shown} has two validation folders; keep one")
        if "validation" not in splits:
            splits |= _carve(splits["train"], ("validation",))
    else:
        splits = _carve(list_classes(""), ("validation", "test"))
    _check(shown, splits)
    classes = sorted(splits["train"])
    return {name: FolderSource(root, split, classes, channels) for name, split in splits.items()}


def walk(
    directory: str,
    *,
    follow_links: bool = True,
    refuse_loops: bool = True,
    above: tuple[Path, ...] = (),
) -> Iterator[_Entry]:
    """The files below a folder at any depth, in no order; those that `scan` leaves out are not.

    A link back to a folder around it is refused with a UserError, or else left out.
    """
    real = Path(directory).resolve()
    if any(folder.is_relative_to(real) for folder in above):
        if refuse_loops:
            raise UserError(f"{printable(directory)} links back to a folder around it; remove it")
        return
    folders, files = scan(directory, follow_links)
    yield from files
    how: Any = {"follow_links": follow_links, "refuse_loops": refuse_loops, "above": (*above, real)}
    for entry in folders:
        yield from walk(entry.path, **how)


def scan(directory: str, follow_links: bool) -> tuple[list[_Entry], list[_Entry]]:
    """Lists the folders and the files of a directory, without hidden ones, pipes and the like."""
    folders, files = [], []
    try:
        for entry in list(os.scandir(directory)):
            if entry.name.startswith(".") or entry.name.lower() in IGNORED:
                continue
            if entry.is_symlink() and not follow_links:
                where = printable(entry.path)
                raise UserError(f"{where} is a link, which config.data.follow_links=False refuses")
            if entry.is_dir():
                folders.append(entry)
            elif entry.is_file() or not os.path.exists(entry.path):
                files.append(entry)  # a link to nothing, too: an example that can't be read
    except OSError as error:  # no permission, or a link to itself
        raise UserError(f"{printable(error.filename)}: {error.strerror}; remove it") from error
    return folders, files


def _list_classes(directory: str, root: str, follow_links: bool) -> _Split:
    classes: _Split = {}
    for folder in scan(directory, follow_links)[0]:
        classes[folder.name] = files = []
        for entry in walk(folder.path, follow_links=follow_links):
            files.append(os.path.relpath(entry.path, root))
    return classes


def _shuffled(path: str) -> bytes:
    """Sorting by it shuffles, the same way on any machine and in any listing order."""
    return hashlib.sha256(os.fsencode(path)).digest()


def _carve(train: _Split, held_out: tuple[str, ...]) -> dict[str, _Split]:
    """Moves a tenth of each class, and at least one file, from train to each held-out split."""
    splits: dict[str, _Split] = {name: {} for name in ("train", *held_out)}
    for label, files in train.items():
        files = sorted(files, key=_shuffled)
        tenth = max(1, (len(files) + 5) // 10) if len(files) >= 3 else 0
        for name in reversed(held_out if tenth else ()):
            files, splits[name][label] = files[:-tenth], files[-tenth:]
        splits["train"][label] = files
    return splits


def _check(shown: str, splits: dict[str, _Split]) -> None:
    """Refuses what can't be trained on or evaluated, with the counts."""
    train = splits["train"]
    if not any(files for split in splits.values() for files in split.values()):
        raise UserError(f"{shown} holds no images; it must be laid out as {LAYOUTS}")
    for name, split in splits.items():
        shortest = sorted(split, key=lambda label: (len(split[label]), label))[:20]
        counts = ", ".join(f"{printable(label)} {len(split[label])}" for label in shortest)
        has = f"{shown} has in {name} {len(split)} classes ({counts or 'no images'})"
        for label in sorted(split):
            if not split[label]:
                raise UserError(f"{has}; fill or remove the class folder {printable(label)}")
            if label not in train:
                raise UserError(f"{has}; train has no class {printable(label)}")
        if not split or (name == "train" and len(split) < 2):
            wanted = "two classes or more are needed" if split else "add some"
            raise UserError(f"{has}; {wanted}")
        for label in sorted(train.keys() - split.keys()):
            logging.warning("%s: %s has no image of class %s", shown, name, printable(label))
