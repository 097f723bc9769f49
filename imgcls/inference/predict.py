"""What a trained model says about pictures.

    python -m imgcls predict --workdir=runs/cifar10 [--checkpoint=latest|best|STEP] [--top=5]
                             [--threshold=0.8] [--raw] [--json|--csv] IMAGE_OR_FOLDER...

Prints a line a picture with its likeliest classes. Folders are searched to any depth, in the order
of the names, without hidden files, masks and what is no picture by its name. With --json a line
is {"path", "predictions": [{"class", "probability"}, ...]}, the likeliest first, or {"path",
"error"} for a file that cannot be read: these are named on stderr, the others are still predicted,
and the exit code is 2. With --csv a picture has a row, or --top: path, class, probability, unsure,
error. Pictures whose likeliest class is below --threshold are marked as unsure. Probabilities are
calibrated where `evaluate` fitted a temperature on validation; with --raw they are the network's.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from absl import flags

from imgcls.arguments import define_harmless
from imgcls.data.folder import read_tree
from imgcls.data.images import decode_image, fit_image
from imgcls.errors import BadExampleError, UserError, did_you_mean_path, printable, visible
from imgcls.inference.classifier import Classifier, load
from imgcls.run import cli, machine
from imgcls.run.logs import complain, progress, say

POSITIONAL = True  # arguments are not only flags


def find_files(arguments: Iterable[str]) -> list[str]:
    """The files named, and all files below the folders named, sorted within each of these.

    Raises:
        UserError: a path does not exist or cannot be listed, or there is no file.
    """
    found: list[str] = []
    for argument in arguments:
        if os.path.isdir(argument):
            found += sorted(read_tree(argument, refuse_loops=False).below())
        elif os.path.isfile(argument):
            found.append(argument)
        else:  # reading a pipe could take for ever
            why = "is no regular file" if os.path.exists(argument) else "does not exist"
            near = did_you_mean_path(argument) or "name pictures or folders"
            raise UserError(f"{printable(argument) or repr('')} {why}: {near}")
    if not found:
        raise UserError("there is no file to predict: name pictures, or folders that hold some")
    return found


def predict(
    classifier: Classifier, paths: list[str], **how: bool
) -> Iterator[np.ndarray | BadExampleError]:
    """Of each file in turn, its row of what the classifier gives, or why there is none.

    Reads by batches; `how` is passed to the classifier.
    """
    c, batch_size = classifier.config.data, classifier.config.eval.batch_size

    def read(path: str) -> np.ndarray | BadExampleError:
        try:
            image = decode_image(path, channels=c.channels)
        except BadExampleError as error:
            return error
        return fit_image(image, image_size=tuple(c.image_size), resize=c.resize)

    bar = progress(len(paths), "reading")
    with bar, ThreadPoolExecutor(machine.cpu_cores()) as executor:
        for start in range(0, len(paths), batch_size):
            images = list(executor.map(read, paths[start : start + batch_size]))
            rows = iter(classifier([x for x in images if isinstance(x, np.ndarray)], **how))
            for image in images:
                bar.update()
                yield next(rows) if isinstance(image, np.ndarray) else image


def define_flags() -> None:
    flags.DEFINE_integer("top", None, "How many classes to show; else 5, or all of fewer.")
    flags.DEFINE_float("threshold", None, "Mark pictures whose best class is less probable.", 0, 1)
    flags.DEFINE_boolean("json", False, "An object a line, for programs, instead of the table.")
    flags.DEFINE_boolean("csv", False, "Comma-separated values, for spreadsheets.")
    define_harmless(checkpoint=True, raw=True)


def main(arguments: list[str]) -> None:
    f, paths = flags.FLAGS, find_files(arguments)
    if f.json and f.csv:
        raise UserError("--json and --csv exclude each other: choose one")
    classifier = load(cli.required_workdir(), f.checkpoint, calibrated=not f.raw)
    names = classifier.class_names
    if f.top is not None and not 1 <= f.top <= len(names):
        raise UserError(f"--top={f.top} must be from 1 to {len(names)}, the classes of this run")
    wide, width = (max(len(visible(text, "")) for text in texts) for texts in (paths, names))
    top = f.top or (1 if f.csv else min(5, len(names)))
    lines = SimpleNamespace(write=partial(say, needed=True))
    table = csv.writer(lines, lineterminator="", quoting=csv.QUOTE_NONNUMERIC)
    if f.csv:
        table.writerow(["path", "class", "probability", "unsure", "error"])
    bad = 0
    for found, path in zip(predict(classifier, paths), paths):
        error, best, doubt = "", list[tuple[str, float]](), {}
        if isinstance(found, BadExampleError):
            bad, error = bad + 1, str(found)
            complain(f"error: {error}")
        else:
            best = [(names[k], float(found[k])) for k in np.argsort(-found)[:top]]
            doubt = {} if f.threshold is None else {"unsure": best[0][1] < f.threshold}
        if f.csv:
            for name, p in best or [("", "")]:
                table.writerow([path, name, p, doubt.get("unsure"), error])
        elif f.json:
            row: Any = {"predictions": [{"class": name, "probability": p} for name, p in best]}
            lines.write(json.dumps({"path": path} | (row if best else {"error": error}) | doubt))
        else:
            text = "".join(f"  {visible(name, ''):<{width}} {p:6.1%}" for name, p in best)
            text = text + "  unsure" * doubt.get("unsure", 0) or "  cannot be read"
            lines.write(f"{visible(path, ''):<{wide}}{text}")
    if bad:
        raise UserError(f"{bad} of {len(paths)} files cannot be read: see above")
