"""A folder of images: `PATH/<class>/*`, or `PATH/{train,validation,test}/<class>/*`."""

import functools
import logging
import os
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imgcls.data.divide import Classes, Splits, complete, nfc, shuffled
from imgcls.data.images import decode_image, hash_files, is_picture, picture_size
from imgcls.errors import UserError, did_you_mean, printable

LAYOUTS = "PATH/<class>/* or PATH/{train,validation,test}/<class>/*"
# What desktops, archives, NAS and caches of thumbnails leave; so do names that start with a dot.
IGNORED = ("thumbs.db", "desktop.ini", "icon\r")
IGNORED_FOLDERS = ("@eadir", "@recycle", "#recycle", "$recycle.bin", "lost+found", "@__thumb")
IGNORED_FOLDERS += ("__macosx", "__pycache__", "thumbnail", "thumbnails", "_thumbnails", "_thumbs")
IGNORED_FOLDERS += ("@tmp", "#snapshot", "system volume information")
# Names of splits, of which only the letters count, with what is written around them.
_SPLITS = {
    "train": "trn|train|training|trainval",
    "validation": "val|valid|validation|validate|validating|dev|eval|evaluation",
    "test": "tst|test|tests|testing|holdout",
}
_AFFIXES = "(?:the|my|raw|set|split|folder|dir|data|dataset|images?|imgs?|pics|pictures|photos)*"
# Of a mask, which is published beside its picture: "a.png", "a_mask.png", "a_mask_1.png".
_MASK = re.compile(r"(?is)(.+)[ _-](mask|segmentation|superpixels)([ _-]?\d+)?(\.[^.]*)?")
LOOKED_AT = 1000  # pictures whose sizes are told


class Tree(NamedTuple):
    """The paths of pictures in a folder, and the folders in it, by NFC of their names."""

    files: list[str]
    folders: "dict[str, Tree]"

    def below(self) -> Iterator[str]:
        """The pictures at any depth."""
        yield from self.files
        for folder in self.folders.values():
            yield from folder.below()

    def levels(self) -> int:
        return max((1 + folder.levels() for folder in self.folders.values()), default=0)


class FolderSource:
    """One split of a folder, in the order of the paths' SHA-256. See `data.cache.Source`."""

    def __init__(
        self, root: str, part: Classes, classes: list[str], channels: int, notes: Sequence[str] = ()
    ):
        """Takes the files of each class, and all classes: a label is an index into these."""
        index = {name: label for label, name in enumerate(classes)}
        labels = {file: index[name] for name, files in part.items() for file in files}
        paths = sorted(labels, key=shuffled)
        self._examples = [(os.path.join(root, path), labels[path]) for path in paths]
        self._channels, self._notes = channels, notes
        self.class_names = tuple(map(printable, classes))
        spelled = Counter(map(nfc, paths))
        self.ids = tuple(printable(p if spelled[nfc(p)] > 1 else nfc(p)) for p in paths)

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

    @functools.cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of the first pictures, by their headers; of readable ones."""
        return [*filter(None, (picture_size(path) for path, _ in self._examples[:LOOKED_AT]))]

    def describe(self) -> list[str]:
        """Sizes of the pictures, and what was noticed in the folder."""
        known = sorted((w * h, f"{w}x{h}") for w, h in self.sizes)
        if not known:
            return [*self._notes]
        low, median, high = (known[place][1] for place in (0, len(known) // 2, -1))
        looked = f" (of {LOOKED_AT:,} looked at)" if len(self) > LOOKED_AT else ""
        return [f"pictures of {low} to {high}, median {median}{looked}", *self._notes]


def open_folder(
    *, data_dir: str | None, channels: int, follow_links: bool = True, ignore: str = "", **how: Any
) -> dict[str, FolderSource]:
    """Opens the splits of a folder of images. Labels number the sorted names of class folders.

    A class holds every picture below its folder, except hidden ones and `IGNORED_FOLDERS`. Folders
    that are named like splits, and nothing else next to them, tell the layout with splits. Where
    there is no test, but validation, that is the test split. Other splits are carved: a tenth of
    each class of train. The SHA-256 of a file's path below PATH decides; a class of one or two
    files stays in train. `how`: see `complete`.

    Raises:
        UserError: No such folder, no images, one class, an empty class or split, a class that train
            lacks, folders of which some or all may be splits, no such folder to `ignore`, a link
            that makes a loop, any link at all when `follow_links` is False.
    """
    if data_dir is None:
        raise UserError(f"image_folder needs --config.data.dir=PATH, laid out as {LAYOUTS}")
    root = os.path.expanduser(data_dir)
    shown = printable(root)
    if os.path.isfile(root):
        raise UserError(f"{shown} is not a directory: config.data.name=table reads CSV and Parquet")
    if not os.path.isdir(root):
        near = did_you_mean(Path(root).name, [p.name for p in Path(root).parent.glob("*/")])
        raise UserError(f"{shown} is not a directory: {near or 'name one with --config.data.dir'}")
    left_out: Counter[str] = Counter()
    tree = read_tree(root, follow_links=follow_links, ignore=ignore, left_out=left_out)
    if unknown := [what[:-1] for what, n in left_out.items() if not n]:
        near = did_you_mean(unknown[0], [*tree.folders, *_unwrapped(tree).folders]) or "correct it"
        raise UserError(f"config.data.ignore: {shown} holds no folder {_listed(unknown)}: {near}")
    pictures = sum(1 for _ in tree.below())
    told = _told(left_out)
    if not pictures:
        others = f" ({', '.join(told)})" if told else ""
        raise UserError(f"{shown} holds no images{others}; it must be laid out as {LAYOUTS}")
    given, validation, nested = _divided(root, shown, tree)
    used = sum(len(files) for split in given.values() for files in split.values())
    if loose := pictures - used:
        told.append(f"{loose:,} pictures in no class folder")
    if loose > used:
        raise UserError(f"{shown} holds {told[-1]} and {used:,} in such: sort or remove the former")
    read = lambda part: FolderSource(root, part, [*part], 3)
    splits, notes = complete(given, validation, read, **how)
    classes = check(shown, splits)
    notes += [*nested, *([f"left out: {', '.join(told)}"] if told else [])]
    return {k: FolderSource(root, split, classes, channels, notes) for k, split in splits.items()}


def read_tree(
    root: str,
    *,
    follow_links: bool = True,
    refuse_loops: bool = True,
    ignore: str = "",
    left_out: Counter[str] | None = None,
) -> Tree:
    """The pictures below a folder; hidden files, masks, pipes and the like are none.

    Folders whose names differ in normal form alone count as one.

    Args:
        root: the folder.
        follow_links: False refuses links with a UserError.
        refuse_loops: a link back to a folder around it is refused with a UserError, or left out.
        ignore: names of folders to leave out, with commas between them.
        left_out: counts what is left out, by the ending of files, the name + "/" of folders, or as
            masks; 0 of folders to ignore that are not there. Without it, that is logged.
    """
    logs, left_out = left_out is None, Counter() if left_out is None else left_out
    names = {nfc(name.strip().rstrip("/")) for name in ignore.split(",")} - {""}
    left_out.update(dict.fromkeys((f"{name}/" for name in names), 0))

    def read(directories: list[str], above: tuple[Path, ...]) -> Tree:
        tree, folders = Tree([], {}), dict[str, list[str]]()
        for directory in directories:
            real = Path(directory).resolve()
            if any(folder.is_relative_to(real) for folder in above):
                if refuse_loops:
                    where = printable(directory)
                    raise UserError(f"{where} links back to a folder around it; remove it")
                continue
            above = (*above, real)
            for entry in list(os.scandir(directory)):
                name, lower = nfc(entry.name), entry.name.lower()
                if (name in names or lower in IGNORED_FOLDERS) and entry.is_dir():
                    left_out[f"{name}/"] += 1
                elif name.startswith(".") or lower in IGNORED:
                    continue
                elif entry.is_symlink() and not follow_links:
                    link = f"{printable(entry.path)} is a link"
                    raise UserError(f"{link}, which config.data.follow_links=False refuses")
                elif entry.is_dir():
                    folders.setdefault(name, []).append(entry.path)
                elif entry.is_file() or not os.path.exists(entry.path):
                    if is_picture(name):  # a link to nothing, too: one that can't be read
                        tree.files.append(entry.path)
                    else:
                        left_out[os.path.splitext(lower)[1] or name] += 1
        stems = {os.path.splitext(file)[0] for file in tree.files}
        masks = {f for f in tree.files if (mask := _MASK.fullmatch(f)) and mask[1] in stems}
        left_out.update(["masks beside their pictures"] * len(masks))
        tree.files[:] = [file for file in tree.files if file not in masks]
        for name, paths in folders.items():
            tree.folders[name] = read(paths, above)
        return tree

    try:
        tree = read([root], ())
    except OSError as error:  # no permission, or a link to itself
        why = f"{printable(error.filename)}: {error.strerror}"
        raise UserError(f"{why}; remove it or make it readable") from error
    if logs and (told := _told(left_out)):
        logging.info("%s: left out: %s", printable(root), ", ".join(told))
    return tree


def _told(left_out: Counter[str]) -> list[str]:
    return [f"{n:,} {printable(what)}" for what, n in left_out.most_common(20) if n]


def _divided(root: str, shown: str, tree: Tree) -> tuple[Splits, str, list[str]]:
    """The splits that a folder has, how it calls validation, and what to say of them."""
    tree, notes = _unwrapped(tree), list[str]()
    if tree.files and not tree.folders:
        raise UserError(f"{shown} holds {_loose(tree)}; lay them out as {LAYOUTS}")
    taken = split_names(tree.folders)
    found, folder_of = {"train": tree}, {name: folder for folder, name in taken.items()}
    if "train" not in folder_of or len(folder_of) < len(tree.folders):
        _refuse_doubt(shown, tree, taken)
    else:
        for name in sorted(folder_of, key="train".__ne__):  # train first
            split, where = tree.folders[folder_of[name]], printable(folder_of[name])
            known = name != "train" and split.folders.keys() & found["train"].folders.keys()
            found[name] = split = split if known else _unwrapped(split)
            unlabelled = not known and name != "train" and len(split.folders) == 1
            unlabelled = unlabelled and re.fullmatch(f"{_AFFIXES}|un.*", letters(*split.folders))
            if unlabelled or (split.files and not split.folders):
                remedy = "sort them into class folders"
                if name != "train":
                    remedy += f", or leave them out with --config.data.ignore={where}"
                raise UserError(f"{shown} holds in {where} {_loose(split)}; {remedy}")
    classes = [folder for split in found.values() for folder in split.folders.values()]
    if levels := max((folder.levels() for folder in classes), default=0):
        notes.append(f"folders in class folders, {levels} deep, belong to the class on top")
    splits = {
        name: {k: [os.path.relpath(f, root) for f in v.below()] for k, v in split.folders.items()}
        for name, split in found.items()
    }
    return splits, folder_of.get("validation", ""), notes


def _unwrapped(tree: Tree) -> Tree:
    """The folder in a folder in a folder that is not the only one in its folder."""
    while len(tree.folders) == 1:
        (sole,) = tree.folders.values()
        if not sole.folders or (sole.files and len(sole.folders) == 1):
            break
        tree = sole
    return tree


def split_names(folders: Iterable[str]) -> dict[str, str]:
    """The folders that are named like splits, and these. What all begin or end with is no name."""
    names, found = list(folders), {}
    start, end = (_beginning([name[::way] for name in names]) for way in (1, -1))
    for name in names:
        core = letters(name[start : len(name) - end])
        for split, words in _SPLITS.items():
            if re.fullmatch(f"{_AFFIXES}({words}){_AFFIXES}", core):
                found[name] = split
    return found


def letters(name: str) -> str:
    return re.sub(r"[\W\d_]", "", name.casefold())


def _beginning(names: list[str]) -> int:
    """The length of what several names begin with, up to the last character that is no letter."""
    begins = os.path.commonprefix(names)  # noqa: RUF071
    return len(begins.rstrip(string.ascii_letters)) if len(names) > 1 else 0


def _refuse_doubt(shown: str, tree: Tree, taken: dict[str, str]) -> None:
    """Raises UserError where folders may be splits or parts, some or all, rather than classes."""
    inside = {name: _unwrapped(folder).folders for name, folder in tree.folders.items()}
    counts = Counter(name for folders in inside.values() for name in folders)
    same = [name for name, n in counts.items() if n > 1 and 2 * n >= len(inside)]
    within = [name for name in inside if {"train"} < set(split_names(inside[name]).values())]
    copies = [name for name in inside if len(inside[name].keys() & inside.keys()) > 1]
    others, splits = sorted(inside.keys() - taken.keys()), Counter(taken.values())
    double = splits.most_common(1)[0][0] if len(splits) < len(taken) else ""
    nested = len(splits) > 1 or any(len(inside[name]) > 1 for name in taken)
    beside = not nested and len(others) > 1 and splits.keys() - {"train"}  # not sorted by class
    doubts = {
        f"there are two {double} folders": double,
        f"most hold the same folders, as splits do ({_listed(same)})": len(same) > 1,
        f"splits are in {_listed(within)}, which --config.data.dir may name": within,
        f"{_listed(copies)} holds the same folders again; --config.data.dir may name it": copies,
        "such names are of parts of a set, not of classes": _are_parts(inside),
    }
    told = [text for text, doubt in doubts.items() if doubt]
    if not (nested or beside or told):
        return
    named = ", ".join(f"{printable(k)} was taken for {v}" for k, v in sorted(taken.items()))
    rest = f"no split is {_listed(others)}" if others else "none for train"
    told = [named, *([] if "train" in splits and not others else [rest]), *told] if taken else told
    leave = others if "train" in splits else [*taken] if beside else []
    raise UserError(
        f"{shown} has the folders {_listed(inside)}; {'; '.join(told)}: rename splits to train, "
        "validation and test, leave folders out with --config.data.ignore="
        f"{','.join(map(printable, leave[:20])) or 'NAMES'}, or list the pictures in a CSV for "
        "--config.data.name=table"
    )


def _are_parts(folders: Iterable[str]) -> bool:
    """Whether folders are named like splits or parts of one set, or like pictures and masks."""
    names = [re.sub(r"[\W\d_]+$", "", name.casefold()) for name in folders]
    found = lambda pattern: sum(bool(re.search(pattern, name)) for name in names)
    alone = r"(^|[\W\d_])"  # before a word that ends a name
    one = len(set(names)) == 1 and found(f"{alone}(part|batch|chunk|fold|(data)?set|data|image)s?$")
    masked = found("(image|img)s?$") and found("(mask|label|annotation|truth)s?$")
    train = found(f"^train|{alone}train(ing)?$")
    test = found(f"^(test|valid)|{alone}(test(ing)?|validation)$")
    return len(names) > 1 and bool(one or masked or (train and test and train + test >= len(names)))


def _listed(names: Iterable[str]) -> str:
    names = sorted(map(printable, names))
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _loose(tree: Tree) -> str:
    return f"{sum(1 for _ in tree.below()):,} pictures beside each other, no class folders"


def check(shown: str, splits: Splits, *, folders: bool = True) -> list[str]:
    """The classes, sorted. Refuses what can't be trained on or evaluated, with the counts."""
    train = splits["train"]
    for name, split in splits.items():
        shortest = sorted(split, key=lambda label: (len(split[label]), label))[:20]
        counts = ", ".join(f"{printable(label)} {len(split[label])}" for label in shortest)
        has = f"{shown} has in {name} {len(split)} classes ({counts or 'no images'})"
        for label in sorted(split):
            where = printable(label)
            leave = f", or leave it out with --config.data.ignore={where}" if folders else ""
            if not split[label]:
                raise UserError(f"{has}; fill or remove the class folder {where}{leave}")
            if label not in train:
                raise UserError(f"{has}; train has no class {where}; rename it{leave}")
        if not split or (name == "train" and len(split) < 2):
            wanted = "two classes or more are needed" if split else "add some"
            raise UserError(f"{has}; {wanted}{', each in its folder' * folders}")
        if lacking := train.keys() - split.keys():
            logging.warning("%s: %s has no image of class %s", shown, name, _listed(lacking))
    return sorted(train)
