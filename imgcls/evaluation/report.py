"""What a person looks at: `report.html`, one self-contained page about a finished run.

    python -m imgcls report --workdir=runs/cifar10

The page needs no network and trusts no text: every value is escaped by jinja2, and the
Content-Security-Policy admits only the style and the script whose hashes it states.
"""

import base64
import contextlib
import errno
import hashlib
import io
import json
import shlex
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from PIL import Image

from imgcls.arguments import define_harmless
from imgcls.config import flatten
from imgcls.data import record
from imgcls.data.splits import Split
from imgcls.errors import CheckpointError, UserError, first_line
from imgcls.evaluation import figures, scores
from imgcls.evaluation.figures import figure
from imgcls.evaluation.mistakes import by_confidence
from imgcls.experiment import load_config, open_splits
from imgcls.run import cli, logs
from imgcls.run.files import write_bytes
from imgcls.run.workdir import claim, read_json

SAMPLES = "augmented.npy"  # uint8[n, H, W, C], which training leaves in the workdir
MATRIX_CLASSES = 20  # the confusion matrix of more is drawn as a picture, not as a table of counts
PAIRS = 15  # rows in the table of the classes that are confused most


class Run(NamedTuple):
    """A workdir's evaluation: logits float32[N, K], labels int32[N], ids str[N]."""

    workdir: Path
    results: dict[str, Any]
    config: dict[str, Any]
    logits: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    looked_at: dict[int, np.ndarray]  # uint8[h, w] by row
    sha256: str  # of results.json


def read_run(workdir: str | Path) -> Run:
    """Reads results.json, predictions.npz and config.json.

    Raises UserError where a file is missing or broken, or two do not fit together; CheckpointError
    where the system cannot read one now.
    """
    workdir = Path(workdir)
    config = read_json(workdir / "config.json")
    path, run_flag = workdir / "results.json", shlex.quote(f"--workdir={workdir}")
    remedy = f"python -m imgcls evaluate {run_flag}"
    try:
        content = path.read_bytes()
        results = json.loads(content)
        shape = (results["examples"], len(results["class_names"]))
        path = workdir / "predictions.npz"
        # Read as a whole, because zipfile takes an error of the disk for a broken file.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as saved:
            logits, labels, ids = (saved[key] for key in ("logits", "labels", "ids"))
            maps = dict(zip(saved.get("mistakes", ()), saved.get("looked_at", ())))  # if any
        if not (logits.shape == shape and labels.shape[:1] == ids.shape == shape[:1]):
            raise ValueError("its shapes are not those of results.json")
        if "per_class" in results:
            scores.checked(logits, labels)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: write it with {remedy}") from error
    # A cut or corrupt npz raises BadZipFile or zlib.error, which are plain Exceptions.
    except Exception as error:
        whole = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        told = f"{'cannot be read' if whole else 'is broken'} ({' '.join(str(error).split())})"
        kind = CheckpointError if whole else UserError
        raise kind(f"{path} {told}: renew it with {remedy}") from error
    sha256 = hashlib.sha256(content).hexdigest()
    return Run(workdir, results, config, logits, labels, ids, maps, sha256)


@contextlib.contextmanager
def shown(workdirs: Sequence[str | Path]) -> Iterator[None]:
    """A UserError tells of values in results.json that no evaluation wrote: few are checked."""
    try:
        yield
    except (TypeError, LookupError, ValueError, ArithmeticError, jinja2.UndefinedError) as error:
        raise UserError(
            f"results.json of {' or '.join(map(str, workdirs))} holds what no evaluation wrote "
            f"({first_line(error)}): renew it with python -m imgcls evaluate"
        ) from error


def write_report(workdir: str | Path, splits: dict[str, Split]) -> Path:
    """Writes `workdir/report.html` from the files of a finished run, and returns its path.

    Shows metrics.jsonl, test_evaluations.jsonl and SAMPLES where there are any, and pictures of
    `splits`: of "test", and of "validation" where the run has it.

    Raises UserError where a file is missing or broken, and what `write_page` raises.
    """
    run, samples = read_run(workdir), []
    with contextlib.suppress(Exception):  # there are none, or whatever a broken file raises
        images = np.load(run.workdir / SAMPLES, mmap_mode="r", allow_pickle=False)
        samples = [image_uri(thumbnail(image)) for image in images]
    history = logs.read_metrics(run.workdir / "metrics.jsonl")
    with shown([workdir]):
        return write_page(
            run.workdir / "report.html",
            "report.html.j2",
            run=run,
            results=run.results,
            names=run.results["class_names"],
            model=flatten(run.config).get("model.name", "model"),
            test_evaluations=logs.read_lines(run.workdir / "test_evaluations.jsonl"),
            curves=figures.learning_curves(history),
            history=history,
            samples=samples,
            **(_of_classes(run, splits) if "per_class" in run.results else {}),
        )


def _of_classes(run: Run, splits: dict[str, Split]) -> dict[str, Any]:
    """What the page shows of a classification alone."""
    per_class, calibration = run.results["per_class"], run.results["calibration"]
    worst = [k for k, row in enumerate(per_class) if row["support"]]
    worst.sort(key=lambda k: per_class[k]["average_precision"])
    bins, temperature = calibration["reliability"], calibration["temperature"]
    series = {"as trained": bins}
    if temperature is not None:
        cooled = scores.reliability(run.logits / temperature, run.labels)
        series[f"at temperature {temperature:.2f}"] = cooled
    confidence, mistakes, unsure = by_confidence(run.logits, run.labels, temperature)
    issues = run.results.get("label_issues", {"examples": 0, "first": []})
    places = [("test", row) for row in (*mistakes.tolist(), *unsure.tolist())]
    places += [(issue["split"], issue["row"]) for issue in issues["first"]]
    pictures = {p: thumbnail(splits[p[0]].picture(p[1])) for p in set(places) if p[0] in splits}
    return {
        "matrix": _confusion(np.array(run.results["confusion_matrix"])),
        "worst": worst,  # lowest average precision first
        "precision_recall": figure(figures.precision_recall, run.logits, run.labels, worst),
        "reliability": figure(figures.reliability, series),
        "confidence_counts": figure(figures.confidence_counts, bins),
        "confidence": confidence,
        "mistakes": mistakes.tolist(),
        "unsure": unsure.tolist(),
        "issues": issues,
        "images": {place: image_uri(picture) for place, picture in pictures.items()},
        "heat": {i: heat_uri(x, pictures["test", i].size) for i, x in run.looked_at.items()},
    }


def write_page(path: Path, template: str, **context: Any) -> Path:
    """Writes a page from a template that extends base.html.j2; every value is escaped.

    Raises CheckpointError where the disk is full or fails, UserError where it refuses otherwise.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.loader = jinja2.PackageLoader("imgcls.evaluation")  # its templates
    environment.undefined = jinja2.StrictUndefined
    for function in (percent, duration, number, plain, sha256):
        environment.filters[function.__name__] = function
    context |= {"light": figures.LIGHT, "dark": figures.DARK, "palette": figures.PALETTE}
    page = environment.get_template(template).render(written=datetime.now(UTC), **context)
    try:
        # A file name that is not UTF-8 comes with lone surrogates, which UTF-8 cannot write.
        write_bytes(path, page.encode("utf-8", errors="replace"))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
        more = "; free some space and run the same command again" * full
        told = f"cannot write {path}: {error.strerror}{more}"
        raise (CheckpointError if full else UserError)(told) from error
    return path


def percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}"


def duration(seconds: float | None) -> str:
    """12.3 s, 4 min 05 s, 1 h 02 min."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def thumbnail(image: np.ndarray) -> Image.Image:
    """uint8[H, W, C], C 1 or 3, at most 256 pixels wide and high."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.thumbnail((256, 256))
    return picture


def image_uri(picture: Image.Image) -> str:
    kind = "jpeg" if max(picture.size) > 96 and picture.mode != "RGBA" else "png"  # 10x smaller
    file = io.BytesIO()
    picture.save(file, kind, quality=85)
    return figures.data_uri(f"image/{kind}", file.getvalue())


def heat_uri(heat: np.ndarray, size: tuple[int, int]) -> str:
    """uint8[h, w] as transparent colours, blue to red, with the proportions of `size`."""
    from matplotlib import colormaps

    reduced = [max(64 * n // max(size), 1) for n in size]
    smooth = np.asarray(Image.fromarray(heat).resize(reduced, Image.Resampling.BICUBIC))
    return image_uri(Image.fromarray(colormaps["turbo"](smooth, alpha=0.5, bytes=True)))


def _confusion(counts: np.ndarray) -> dict[str, Any]:
    """The matrix as table cells or, with many classes, as a picture; and its largest errors.

    Shares are of the true class. Errors are shaded by the root of their share, up to the largest,
    so that they show beside a diagonal of nearly one.
    """
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    right = np.eye(len(counts), dtype=bool)
    errors = np.where(right, 0, counts)
    worst = np.where(right, 0, share).max() or 1
    shade = np.where(right, share, 0.7 * np.sqrt(share / worst)).clip(max=1)
    largest = np.argsort(-errors, axis=None, kind="stable")[:PAIRS]
    pairs = [pair for pair in zip(*np.unravel_index(largest, errors.shape)) if errors[pair]]
    bad, good = ([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in figures.PALETTE[:2])
    pixels = np.dstack([np.where(right[..., None], good, bad), 255 * shade]).astype(np.uint8)
    return {
        "counts": counts,
        "shares": share,
        "heat": np.ceil(10 * shade).astype(int),
        "pairs": pairs,
        "picture": image_uri(Image.fromarray(pixels)) if len(counts) > MATRIX_CLASSES else None,
    }


define_flags = define_harmless


def main(_: list[str]) -> None:
    workdir = cli.required_workdir()
    config = load_config(workdir)
    with claim(workdir):
        run = read_run(workdir)  # what is missing is said before the data is loaded
        names = ["test", *(["validation"] if config.data.validation else [])]
        splits = dict(zip(names, open_splits(config, *names)))
        record.check(workdir, splits)
        if run.ids.tolist() != list(splits["test"].ids):
            raise UserError(
                f"the test examples are no longer those of {workdir / 'predictions.npz'}: restore "
                "the data, or evaluate again"
            )
        path = write_report(workdir, splits)
    logs.say(f"wrote {path}")
