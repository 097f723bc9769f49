"""How good a trained model is, on a split of its data.

    python -m imgcls evaluate --workdir=runs/cifar10 [--split=test|validation|train]
                              [--checkpoint=latest|best|STEP] [--tta=flip|shifts]
                              [--data_dir=OTHER]

Reads the run's own config. Writes results.json for the test split at the checkpoint that the config
names, results_<split>_<checkpoint>.json for any other, and predictions*.npz beside it. With --tta
the logits of several views of each image are averaged too: a second figure beside the plain one.
label_issues*.csv lists the examples of test and validation whose labels the model contradicts.
With --data_dir it evaluates the pictures OTHER/<class>/* of the run's classes, which is no look at
the test split, and writes results_on_<folder>_<checkpoint>.json.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from imgcls import config as configs
from imgcls import experiment
from imgcls.arguments import define_harmless
from imgcls.data import record
from imgcls.data.folder import FolderSource, read_tree
from imgcls.data.splits import Split, load_splits
from imgcls.errors import DivergedError, UserError, did_you_mean_path, printable
from imgcls.evaluation.mistakes import looked_at, write_issues
from imgcls.evaluation.report import read_run, write_report
from imgcls.evaluation.scores import score
from imgcls.inference.classifier import Classifier, load
from imgcls.parallel import is_main
from imgcls.run import cli, files, machine
from imgcls.run.logs import say
from imgcls.run.workdir import claim, write_json
from imgcls.state import count_parameters


def evaluate(
    classifier: Classifier,
    splits: dict[str, Split],
    workdir: Path,
    *,
    split: str,
    checkpoint: str,
    tta: str = "",
    poll: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Evaluates, writes the results and predictions files, prints the result and returns it.

    Args:
        classifier: at the checkpoint to evaluate.
        splits: `split` and, where the run has it, "validation", on which a temperature is fitted.
        workdir: of the run.
        split: "train", "validation", "test", or a name for other data.
        checkpoint: the name it goes by: "latest", "best" or a step.
        tta: a key of `VIEWS`: adds the figures of test-time augmentation.
        poll: called before each batch; may raise to stop.
    """
    config, task = classifier.config, classifier.experiment.task
    step, examples, names = int(classifier.state.step), splits[split], splits[split].class_names
    if names != classifier.class_names:
        raise UserError(
            f"the classes of the data are no longer those that {workdir} was trained on: restore "
            "the data, or train again in another --workdir"
        )
    record.check(workdir, splits)
    if split == "test" and is_main():  # each look counts: choices belong on validation
        record.keep(workdir, {split: examples})
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        look = json.dumps({"checkpoint": checkpoint, "step": step, "time": now})
        files.append_line(workdir / "test_evaluations.jsonl", look)
    logits = {name: classifier.logits(part, poll=poll) for name, part in splits.items()}
    fit_on = [(logits[name], splits[name].labels) for name in splits if name == "validation"]
    try:
        scores = score(task, logits[split], examples.labels, names, *fit_on)
    except DivergedError as error:
        raise DivergedError(f"{workdir}, checkpoint {checkpoint}: {error}") from error
    results = _told(classifier, examples, checkpoint) | scores
    results |= {} if split in config.data else {"dataset": "image_folder"}
    if tta:
        mean = classifier.logits(examples, views=VIEWS[tta], poll=poll)
        averaged = score(task, mean, examples.labels, names)
        say(f"{split} {_shown(averaged)} with test-time augmentation ({tta})")
        kept = averaged.get("figures", ("top1", "top1_interval", "top5", "loss"))
        results["test_time_augmentation"] = {"views": tta} | {key: averaged[key] for key in kept}
    official = split == "test" and checkpoint == config.eval.checkpoint
    suffix = "" if official else f"_{split}_{checkpoint}"
    arrays: Any = {"logits": logits[split], "labels": examples.labels, "ids": examples.ids}
    temperature = scores.get("calibration", {}).get("temperature")
    if official and "per_class" in scores and scores["top1"] < 1:
        arrays |= looked_at(classifier, examples, logits[split], temperature)
    if not is_main():
        return results
    if split != "train" and "per_class" in scores:
        path = workdir / f"label_issues{suffix}.csv"
        results["label_issues"] = write_issues(path, splits, logits, temperature)
    with files.replacing(workdir / f"predictions{suffix}.npz") as file:
        np.savez_compressed(file, **arrays)
    path = workdir / f"results{suffix}.json"
    write_json(path, results)
    if official:
        write_report(workdir, splits)
    say(f"{split} {_shown(scores)}  {path}")
    return results


def _told(classifier: Classifier, examples: Split, checkpoint: str) -> dict[str, Any]:
    """What results.json says of a run, besides its scores."""
    config, meta = classifier.config, classifier.meta
    step = int(classifier.state.step)
    rate = step * config.train.batch_size / max(meta["train_seconds"], 1e-9)
    return {
        "dataset": config.data.name,
        "split": examples.name,
        "checkpoint": checkpoint,
        "step": step,
        **{key: meta[key] for key in TOLD if key in meta},
        "config": configs.chosen(config),
        "epochs": config.train.epochs,
        "seed": config.seed,
        "seconds": round(meta["seconds"], 1),
        "images_per_second": round(rate, 1),
        "parameters": count_parameters(classifier.state.params),
        "class_names": list(examples.class_names),
        **meta.get("trained_by", machine.describe()),
        "evaluated_by": machine.describe(),
    }


def is_evaluated(config: ConfigDict, workdir: Path, splits: dict[str, Split], *, step: int) -> bool:
    """Whether results.json is of this step and config, with predictions and a report.

    A report that is missing or torn is written again: that is no other look at the test split.
    """
    page = workdir / "report.html"
    expected = {"step": step, "epochs": config.train.epochs, "config": configs.chosen(config)}
    try:
        found = read_run(workdir)
        # Older results are without a config.
        same = all(found.results.get(key, value) == value for key, value in expected.items())
        reported = page.is_file() and found.sha256.encode() in page.read_bytes()[-99:]
        if same and not reported and is_main():
            write_report(workdir, splits)
        return same
    except UserError:
        return False


def _shown(scores: dict[str, Any]) -> str:
    if "figures" in scores:
        return "  ".join(f"{name} {scores[name]:.4f}" for name in scores["figures"])
    right, examples = round(scores["top1"] * scores["examples"]), scores["examples"]
    return f"top1 {scores['top1']:.4f} ({right}/{examples})"


def _mirrored(images: np.ndarray) -> list[np.ndarray]:
    """Images uint8[N, H, W, C], and their mirror images."""
    return [images, images[:, :, ::-1]]


def _shifted(images: np.ndarray) -> list[np.ndarray]:
    """Shifted by (1, 1), (0, 0) and (-1, -1) pixels, each with its mirror image: six views."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    parts = (slice(1, -1), slice(0, -2), slice(2, None))
    return [view for part in parts for view in _mirrored(padded[:, part, part])]


TOLD = ("in_place_of", "data", "init_from", "stopped_early")  # in the results, of a run's meta
VIEWS = {"flip": _mirrored, "shifts": _shifted}


def define_flags() -> None:
    flags.DEFINE_enum("split", "test", ["test", "validation", "train"], "What to evaluate on.")
    flags.DEFINE_string("data_dir", None, "Folder of other pictures to evaluate on.")
    define_harmless(checkpoint=True)
    flags.DEFINE_enum("tta", None, list(VIEWS), "Test-time augmentation, reported beside.")


def main(_: list[str]) -> None:
    f, workdir, split = flags.FLAGS, cli.required_workdir(), flags.FLAGS.split
    named = experiment.load_config(workdir).eval.checkpoint
    official = split == "test" and f.checkpoint in ("", named) and f.data_dir is None
    otherwise = "name a --split or --checkpoint whose results have a file of their own"
    with claim(workdir, otherwise) if official else contextlib.nullcontext():
        classifier = load(workdir, f.checkpoint, calibrated=False)
        config, names = classifier.config, classifier.class_names
        if f.data_dir is not None:
            place = os.path.abspath(f.data_dir).split("/")[-2:]
            split = re.sub(r"\W+", "-", f"on_{'/'.join(place)}")
            splits = {split: open_other(classifier, f.data_dir)}
        elif not config.data[split]:
            raise UserError(f"--split={split}: this run has none, config.data.{split} is empty")
        else:
            opened = [name for name in dict.fromkeys((split, "validation")) if config.data[name]]
            splits = dict(zip(opened, experiment.open_splits(config, *opened)))
        goes_by = {"split": split, "checkpoint": f.checkpoint or named}
        try:
            scores = evaluate(classifier, splits, workdir, **goes_by, tta=f.tta or "")
        except OSError as error:
            raise UserError(f"{workdir} cannot be written: {error.strerror}") from error
        if f.data_dir is not None and "confusion_matrix" in scores:
            counts = np.array(scores["confusion_matrix"]) * ~np.eye(len(names), dtype=bool)
            most = [divmod(i, len(names)) for i in counts.argsort(axis=None)[:-6:-1].tolist()]
            pairs = [f"{names[i]} as {names[j]} {counts[i, j]}" for i, j in most if counts[i, j]]
            say(f"confused most: {', '.join(pairs) or 'none'}")


def open_other(classifier: Classifier, root: str) -> Split:
    """Pictures root/<class>/* of the run's classes; a UserError where there are none."""
    c, names = classifier.config.data, classifier.class_names
    if not os.path.isdir(root):
        near = did_you_mean_path(root) or "name one that holds <class>/*"
        raise UserError(f"--data_dir={root} is not a directory: {near}")
    tree = read_tree(root, follow_links=c.follow_links, ignore=c.ignore)
    found = {printable(name): [*folder.below()] for name, folder in tree.folders.items()}
    known = {k: [os.path.relpath(path, root) for path in found.get(k, ())] for k in names}
    unknown = ", ".join(sorted(found.keys() - {*names}))
    if not any(known.values()):
        but = f"{', '.join(names[:20])}: its folders are {unknown or 'none'}"
        raise UserError(f"--data_dir={root} has no folder of pictures of the classes {but}")
    if missing := ", ".join(name for name in names if not known[name]):
        logging.warning("%s has no pictures of %s", root, missing)
    if unknown:
        logging.warning("%s has folders that are no class of this run, left out: %s", root, unknown)
    sources: Any = {"pictures": FolderSource(root, known, list(names), c.channels)}
    how: Any = {"image_size": tuple(c.image_size), "channels": c.channels, "resize": c.resize}
    (split,) = load_splits(sources, ["pictures"], **how, skip_bad=c.skip_bad)
    name = f"{root} without {unknown}" if unknown else root
    return dataclasses.replace(split, name=name, class_names=names)
