"""Errors that a user can cause and mend: one clear line and a documented exit code.

Anything else that escapes is a defect of this project and keeps its traceback.
"""

import os
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path


class ImgclsError(Exception):
    """Base: its text is one line that names the file, flag or field, and the remedy."""

    exit_code = 1


class UserError(ImgclsError):
    """The command, the config or the data is wrong."""

    exit_code = 2


class DivergedError(ImgclsError):
    """Loss or gradient stopped being finite."""

    exit_code = 3


class CheckpointError(ImgclsError):
    """A checkpoint cannot be written, read or used."""

    exit_code = 4


class PeerError(ImgclsError):
    """Another process of the run is gone."""


class Stopped(ImgclsError):
    """A signal ended the run after it saved what it could: see `imgcls.run.signals`."""

    exit_code = 143


class BadExampleError(UserError):
    """One example cannot be read. The loader collects these, to skip or to list them together."""


ELSEWHERE = """path=data.dir data=data.dir data_dir=data.dir lr=optim.learning_rate model=model.name
    bs=train.batch_size wd=optim.weight_decay optimizer=optim.name dataset=data.name"""
SYNONYMS = dict(pair.split("=") for pair in ELSEWHERE.split())  # what keys are called elsewhere


def did_you_mean(name: str, known: Sequence[str], shown: Sequence[object] = ()) -> str:
    """ "did you mean X?" of the nearest of the known names, as it is `shown`; else empty."""
    folded = dict(zip(map(str.lower, known), shown or known))
    near = get_close_matches(name.lower(), folded, 1)
    return f"did you mean {folded[near[0]]}?" if near else ""


def did_you_mean_path(path: str | os.PathLike[str]) -> str:
    """ "did you mean PATH?" of what is beside a path; else empty."""
    beside = [p for p in Path(path).parent.glob("*") if p.name != Path(path).name]
    return did_you_mean(Path(path).name, [p.name for p in beside], beside)


def meant(name: str, known: Iterable[str]) -> str:
    """What to say of a flag or a key that is none of `known`: the nearest of them, or a list."""
    plain = lambda text: text.lower().replace("-", "_").lstrip("_").removeprefix("config.")
    names = {plain(text): text for text in known}
    section, _, last = plain(name).rpartition(".")
    inside, ends = [k for k in names if k.startswith(f"{section}.")], dict[str, str]()
    for key in (*inside, *names):
        ends.setdefault(key.rpartition(".")[2], key)
    near = [ends[last]] if last in ends else [ends[k] for k in ends if last and k.startswith(last)]
    near += [k for k in (SYNONYMS.get(last, ""),) if k in names]
    near += [ends[k] for k in get_close_matches(last, ends, 1, 0.7)]
    listed = ", ".join(names[k] for k in inside or [k for k in names if "." not in k] or names)
    return f"did you mean {names[near[0]]}?" if near else f"there are {listed}"


def printable(text: str | os.PathLike[str]) -> str:
    """Escapes control characters, line ends and undecodable bytes; distinct texts stay distinct."""
    return visible(os.fspath(text).replace("\\", r"\\").replace("\n", r"\n").replace("\t", r"\t"))


def visible(text: str, kept: str = "\n\t") -> str:
    """Escapes what a terminal would obey or cannot show, except for the characters in `kept`."""
    shown = lambda char: char if char.isprintable() else char.encode("unicode_escape").decode()
    return "".join(char if char in kept else shown(char) for char in text)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def out_of_memory(error: BaseException) -> UserError | None:
    """What to do about an error that means too little memory, of the device or of the machine."""
    signs = ("RESOURCE_EXHAUSTED", "MemoryError", "Out of memory")
    if not any(sign in f"{type(error).__name__}: {error}" for sign in signs):
        return None
    return UserError(
        f"out of memory ({first_line(error)}): raise "
        "config.train.accumulate_steps (BatchNorm then normalises each part alone), lower "
        "config.train.batch_size or config.eval.batch_size, or choose a smaller config.model"
    )
