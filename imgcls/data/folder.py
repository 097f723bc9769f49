"""A folder of images: `PATH/<class>/*`, or `PATH/{train,validation,test}/<class>/*`."""

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from imgcls.data.images import DECODER, decode_image
from imgcls.errors import UserError, printable

LAYOUTS = "PATH/<class>/* or PATH/{train,validation,test}/<class>/*"
SPLIT_FOLDERS = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "test": "test",
}
# What desktops leave in folders; names that start with a dot are ignored too.
IGNORED = ("thumbs.db", "desktop.ini")


class _File(NamedTuple):
    path: str  # below the root
    size: int
    mtime_ns: int

    @property
    def key(self) -> bytes:
        """Sorting by it shuffles, the same way on any machine and in any listing order."""
        return hashlib.sha256(os.fsencode(self.path)).digest()


_Split = dict[str, list[_File]]  # by class


class FolderSource:
    """One split of a folder, in the order of the paths' SHA-256. See `data.sources.Source`."""

    def __init__(self, root: str, split: _Split, classes: list[str], channels: int):
        """Takes the files of each class, and all classes: a label is an index into these."""
        index = {name: label for label, name in enumerate(classes)}
        examples = [(file, index[name]) for name, files in split.items() for file in files]
        examples.sort(key=lambda example: example[0].key)
        self._root, self._channels = root, channels
        self._paths = [file.path for file, _ in examples]
        self._labels = [label for _, label in examples]
        self.class_names = tuple(printable(name) for name in classes)
        self.ids = tuple(printable(path) for path in self._paths)
        content = repr((DECODER, channels, classes, examples)).encode()
        self.fingerprint = f"image_folder {hashlib.sha256(content).hexdigest()}"

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = decode_image(os.path.join(self._root, self._paths[index]), channels=self._channels)
        return {"image": image, "label": self._labels[index]}


def open_folder(
    *, data_dir: str | None, channels: int, follow_links: bool = True, **_: Any
) -> dict[str, FolderSource]:
    """Opens the splits of a folder of images. Labels number the sorted names of class folders.

    A class holds every regular file below its folder, whatever the name, except hidden files and
    `IGNORED`. The layout with splits is told by a folder `train` that has only other splits beside
    it ("val" and "valid" are validation); without validation, that is a tenth of each class of
    train. In the other layout, validation and test are a tenth of each class. The SHA-256 of a
    file's path below PATH decides where it goes; a class of one or two files stays in train.

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

    folders = [entry.name for entry in scan(root, follow_links)[0]]
    if "train" in folders and set(folders) <= set(SPLIT_FOLDERS):
        if len({SPLIT_FOLDERS[folder] for folder in folders}) < len(folders):
            raise UserError(f"{shown} has two validation folders; keep one")
        splits = {
            SPLIT_FOLDERS[folder]: _list_classes(os.path.join(root, folder), root, follow_links)
            for folder in sorted(folders)
        }
        if "validation" not in splits:
            splits |= _carve(splits["train"], ("validation",))
    else:
        splits = _carve(_list_classes(root, root, follow_links), ("validation", "test"))

    _check(shown, splits)
    classes = sorted(splits["train"])
    return {name: FolderSource(root, split, classes, channels) for name, split in splits.items()}


def walk(
    directory: str,
    *,
    follow_links: bool = True,
    refuse_loops: bool = True,
    above: tuple[Path, ...] = (),
) -> Iterator[os.DirEntry[str]]:
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
    options = {"follow_links": follow_links, "refuse_loops": refuse_loops}
    for entry in folders:
        yield from walk(entry.path, above=(*above, real), **options)


def scan(
    directory: str, follow_links: bool
) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
    """Lists the folders and the files of a directory, without hidden ones, pipes and the like."""
    folders, files = [], []
    try:
        for entry in os.scandir(directory):
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
    def file(entry: os.DirEntry[str]) -> _File:
        stat = entry.stat(follow_symlinks=entry.is_file())
        return _File(os.path.relpath(entry.path, root), stat.st_size, stat.st_mtime_ns)

    folders, _ = scan(directory, follow_links)
    return {
        entry.name: [file(found) for found in walk(entry.path, follow_links=follow_links)]
        for entry in folders
    }


def _carve(train: _Split, held_out: tuple[str, ...]) -> dict[str, _Split]:
    """Moves a tenth of each class, and at least one file, from train to each held-out split."""
    splits: dict[str, _Split] = {name: {} for name in ("train", *held_out)}
    for label, files in train.items():
        files = sorted(files, key=lambda file: file.key)
        tenth = max(1, (len(files) + 5) // 10) if len(files) >= 3 else 0
        start = len(files) - tenth * len(held_out)
        splits["train"][label] = files[:start]
        for name in held_out if tenth else ():
            splits[name][label] = files[start : start + tenth]
            start += tenth
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
