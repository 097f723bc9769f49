"""What a person looks at: `report.html`, one self-contained page about a finished run.

    python -m imgcls report --workdir=runs/cifar10

The page needs no network and trusts no text: every value is escaped by jinja2, and the
Content-Security-Policy admits only the style and the script whose hashes it states.
"""

import base64
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image
from scipy.special import softmax

from imgcls.config import flatten
from imgcls.errors import UserError
from imgcls.evaluation import figures
from imgcls.experiment import load_config, open_splits
from imgcls.run import cli, logs
from imgcls.run.files import write_bytes
from imgcls.run.workdir import read_json

TEMPLATES = Path(__file__).parent / "templates"
SAMPLES = "augmented.npy"  # uint8[n, H, W, C], which training leaves in the workdir
GALLERY = 24  # images in each of the two galleries
MATRIX_CLASSES = 20  # the confusion matrix of more is drawn as a picture, not as a table of counts
PAIRS = 15  # rows in the table of the classes that are confused most


@dataclass(frozen=True)
class Run:
    """A workdir's evaluation: logits float32[N, K], labels int32[N], ids str[N]."""

    workdir: Path
    results: dict[str, Any]
    config: dict[str, Any]  # flat: {"data.name": "digits"}
    logits: np.ndarray
    labels: np.ndarray
    ids: np.ndarray


def read_run(workdir: str | Path) -> Run:
    """Reads results.json, predictions.npz and config.json.

    Raises:
        UserError: a file is missing or broken, or two do not fit together.
    """
    workdir = Path(workdir)
    config = flatten(read_json(workdir / "config.json"))
    remedy = f"python -m imgcls evaluate --workdir={workdir}"
    name = "results.json"
    try:
        results = json.loads((workdir / name).read_text(encoding="utf-8"))
        shape = (results["examples"], len(results["class_names"]))
        name = "predictions.npz"
        with np.load(workdir / name, allow_pickle=False) as saved:
            logits, labels, ids = (saved[key] for key in ("logits", "labels", "ids"))
        if not (logits.shape == shape and labels.shape[:1] == ids.shape == shape[:1]):
            raise ValueError("its shapes are not those of results.json")
    except FileNotFoundError as error:
        raise UserError(f"{workdir / name} does not exist: write it with {remedy}") from error
    # A cut or corrupt npz raises BadZipFile or zlib.error, which are plain Exceptions.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{workdir / name} is broken ({reason}): renew it with {remedy}") from error
    return Run(workdir, results, config, logits, labels, ids)


def write_report(
    workdir: str | Path,
    *,
    gallery_images: Callable[[np.ndarray], np.ndarray],
) -> Path:
    """Writes `workdir/report.html` from the files of a finished run, and returns its path.

    Args:
        workdir: has results.json, predictions.npz and config.json, and where there are any
            metrics.jsonl, test_evaluations.jsonl and SAMPLES.
        gallery_images: positions int[n] of evaluated examples -> their images uint8[n, H, W, C].

    Raises:
        UserError: a file is missing or broken, or the page cannot be written.
    """
    run = read_run(workdir)
    page = render(
        "report.html.j2",
        run=run,
        results=run.results,
        names=run.results["class_names"],
        config_groups=_groups(run.config),
        test_evaluations=logs.read_metrics(run.workdir / "test_evaluations.jsonl"),
        curves=figures.learning_curves(logs.read_metrics(run.workdir / "metrics.jsonl")),
        samples=[image_uri(image) for image in _read_samples(run.workdir)],
        **_shown_of_a_task(run, gallery_images),
    )
    return write_page(run.workdir / "report.html", page)


def _shown_of_a_task(run: Run, gallery_images: Callable[[np.ndarray], np.ndarray]) -> dict:
    """What the page shows of a classification, or else the means of the task's figures."""
    if "per_class" not in run.results:
        return {"matrix": None, "means": run.results["figures"]}
    calibration, classes = run.results["calibration"], _worst_classes(run.results["per_class"])
    highlighted = len(figures.PALETTE)
    return {
        "calibration": calibration,
        "matrix": _confusion(run.results["confusion_matrix"]),
        "worst": classes[:highlighted],
        "other_classes": len(classes[highlighted:]),
        "precision_recall": figures.precision_recall(
            run.logits, run.labels, classes=classes, highlighted=highlighted
        ),
        "reliability": figures.reliability(
            run.logits, run.labels, temperature=calibration["temperature"]
        ),
        "confidence_counts": figures.confidence_counts(calibration["reliability"]),
        "galleries": _galleries(run, gallery_images),
    }


def render(template: str, **context: Any) -> str:
    """A page from a template that extends base.html.j2; every value is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "duration": duration, "plain": plain}
    style = environment.get_template("style.css.j2").render(
        light=figures.LIGHT, dark=figures.DARK, palette=figures.PALETTE
    )
    script = (TEMPLATES / "sort.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    context |= {"policy": policy, "style": Markup(style), "script": Markup(script)}
    return environment.get_template(template).render(written=datetime.now(UTC), **context)


def write_page(path: Path, page: str) -> Path:
    """Writes the page; UserError where the file system refuses."""
    try:
        # A file name that is not UTF-8 comes with lone surrogates, which UTF-8 cannot write.
        write_bytes(path, page.encode("utf-8", errors="replace"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}"


def duration(seconds: float | None) -> str:
    """12.3 s, 4 min 05 s, 1 h 02 min."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"


def _groups(flat: dict[str, Any]) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        group, _, name = key.rpartition(".")
        groups.setdefault(group, {})[name] = value
    return groups


def plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def image_uri(image: np.ndarray, largest: int = 192) -> str:
    """uint8[H, W, C], C 1, 3 or 4, as a PNG whose sides are at most `largest`."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.thumbnail((largest, largest))
    file = io.BytesIO()
    picture.save(file, "png")
    return figures.data_uri("image/png", file.getvalue())


def _worst_classes(per_class: list[dict[str, Any]]) -> list[int]:
    """The classes that occur, lowest average precision first."""
    present = [k for k, row in enumerate(per_class) if row["support"]]
    return sorted(present, key=lambda k: per_class[k]["average_precision"])


def _confusion(counts: list[list[int]]) -> dict[str, Any]:
    """The matrix as table cells or, with many classes, as a picture; and its largest errors.

    Shares are of the true class. Errors are shaded by the root of their share, up to the largest,
    so that they show beside a diagonal of nearly one.
    """
    matrix = np.array(counts)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    right = np.eye(len(matrix), dtype=bool)
    errors = np.where(right, 0, matrix)
    worst = np.where(right, 0, share).max() or 1
    shade = np.where(right, share, 0.7 * np.sqrt(share / worst)).clip(max=1)
    largest = np.argsort(-errors, axis=None, kind="stable")[:PAIRS]
    pairs = [divmod(int(cell), len(matrix)) for cell in largest]
    bad, good = ([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in figures.PALETTE[:2])
    pixels = np.dstack([np.where(right[..., None], good, bad), 255 * shade]).astype(np.uint8)
    return {
        "counts": counts,
        "shares": share.tolist(),
        "heat": np.ceil(10 * shade).astype(int).tolist(),
        "pairs": [(i, j) for i, j in pairs if errors[i, j]],
        "picture": image_uri(pixels, len(matrix)) if len(matrix) > MATRIX_CLASSES else None,
    }


def _galleries(run: Run, images: Callable[[np.ndarray], np.ndarray]) -> dict[str, list[dict]]:
    """The most confident mistakes, then the least sure of all examples, right or wrong."""
    confidence = softmax(run.logits.astype(np.float64), axis=1).max(axis=1)
    predicted = run.logits.argmax(axis=1)
    mistakes = np.flatnonzero(predicted != run.labels)
    mistakes = mistakes[np.argsort(-confidence[mistakes], kind="stable")][:GALLERY]
    unsure = np.argsort(confidence, kind="stable")[:GALLERY]
    positions = np.concatenate([mistakes, unsure])
    items = [
        {
            "image": image_uri(image),
            "id": run.ids[position],
            "truth": int(run.labels[position]),
            "predicted": int(predicted[position]),
            "confidence": float(confidence[position]),
        }
        for position, image in zip(positions, images(positions), strict=True)
    ]
    return {"mistakes": items[: len(mistakes)], "unsure": items[len(mistakes) :]}


def _read_samples(workdir: Path) -> Sequence[np.ndarray]:
    """The augmented training images uint8[n, H, W, C] that training left, if any."""
    try:
        return np.load(workdir / SAMPLES, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return []


def define_flags() -> None:
    pass


def main(_: list[str]) -> None:
    workdir = cli.required_workdir()
    run = read_run(workdir)  # what is missing is said before the data is loaded
    (examples,) = open_splits(load_config(workdir), "test")
    if run.ids.tolist() != list(examples.ids):
        raise UserError(
            f"the test examples are no longer those of {workdir / 'predictions.npz'}: restore the "
            f"data, or evaluate again with python -m imgcls evaluate --workdir={workdir}"
        )
    path = write_report(workdir, gallery_images=lambda rows: examples.read(rows)["image"])
    logs.say(f"wrote {path}")
