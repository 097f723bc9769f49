"""Is one run better than another? Paired statistics from the saved predictions.

    python -m imgcls compare DIR_A DIR_B [DIR_C ...] [--output=compare.html]

Every run is compared with the first, example by example, on the terminal and on a page. Intervals
and p-values answer for the choice of test examples. They know nothing of the training seed: a
difference that another seed undoes is none, however small its p.
"""

from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np
from absl import flags
from scipy.stats import binomtest

from imgcls.config import flatten
from imgcls.errors import UserError, printable
from imgcls.evaluation import figures, report
from imgcls.evaluation.report import Run, duration, number, percent, plain
from imgcls.run.logs import say

RESAMPLES = 10_000
CHANGED_CLASSES = 5  # named on the terminal; the page has them all
LETTERS = [a + b for a in ("", *ascii_uppercase) for b in ascii_uppercase]
POSITIONAL = True  # arguments are not only flags


def compare(workdirs: Sequence[str | Path]) -> dict[str, Any]:
    """Compares finished runs by their results.json, predictions.npz and config.json.

    Returns:
        examples;
        runs: per run its letter (A, B, ... Z, AA, ...), workdir and results.json;
        differences: per run after the first its letter, the difference of its top1 to A's, the 95%
            bootstrap interval of that, gained and lost (examples that it alone, or A alone, gets
            right) and p_value (McNemar's test, exact);
        per_class: per class its name, support and recall in each run (None where it is absent);
        config: {key: values of the runs} for the keys whose values differ.

    Raises:
        UserError: fewer than two workdirs, an unusable one, or test examples that differ.
    """
    if len(workdirs) < 2:
        raise UserError("name at least two workdirs: python -m imgcls compare DIR_A DIR_B")
    runs = [report.read_run(workdir) for workdir in workdirs]
    summaries, differences = [], []
    for letter, run in zip(LETTERS, runs):
        _check_comparable(runs[0], run)
        summaries.append(run.results | {"letter": letter, "workdir": str(run.workdir)})
        differences.append({"letter": letter} | _difference(runs[0], run))
    recalls = zip(*([row["recall"] for row in run.results["per_class"]] for run in runs))
    configs = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: [config.get(key) for config in configs] for key in keys}
    return {
        "examples": len(runs[0].labels),
        "runs": summaries,
        "differences": differences[1:],
        "per_class": [
            {"name": row["name"], "support": row["support"], "recall": list(recall)}
            for row, recall in zip(runs[0].results["per_class"], recalls)
        ],
        "config": {key: v for key, v in values.items() if any(other != v[0] for other in v)},
    }


def _check_comparable(a: Run, b: Run) -> None:
    if "per_class" not in b.results:
        raise UserError(f"{b.workdir} is no classification: only these can be compared")
    names, difference = a.results["class_names"], ""
    if names != b.results["class_names"]:
        difference = "their classes differ"
    elif len(a.ids) != len(b.ids):
        difference = f"{len(a.ids)} and {len(b.ids)} examples"
    elif not (same := (a.ids == b.ids) & (a.labels == b.labels)).all():
        i = same.argmin()
        each = [f"{str(run.ids[i])!r} of class {names[run.labels[i]]!r}" for run in (a, b)]
        difference = f"example {i} is {each[0]} and {each[1]}"
    if difference:
        raise UserError(
            f"{a.workdir} and {b.workdir} were tested on different examples ({difference}): "
            "compare runs evaluated on the same test split"
        )


def _difference(a: Run, b: Run) -> dict[str, Any]:
    right_a, right_b = (run.logits.argmax(axis=1) == run.labels for run in (a, b))
    n, gained, lost = len(a.labels), int((right_b > right_a).sum()), int((right_a > right_b).sum())
    # Paired examples count +1, -1 or 0, so resampling n of them is one multinomial draw.
    shares = [gained / n, lost / n, (n - gained - lost) / n]
    draws = np.random.default_rng(0).multinomial(n, shares, size=RESAMPLES)
    return {
        "difference": (gained - lost) / n,
        "interval": np.percentile((draws[:, 0] - draws[:, 1]) / n, [2.5, 97.5]).tolist(),
        "gained": gained,
        "lost": lost,
        "p_value": float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
    }


def as_text(comparison: dict[str, Any]) -> str:
    """The comparison for a terminal."""
    runs, per_class = comparison["runs"], comparison["per_class"]
    head = ["", "workdir", "top-1 %", "95% interval", "loss", "ECE %"]
    table = [[*head, "time", "images/s", "parameters"]]
    for run in runs:
        interval = " to ".join(percent(bound, 2) for bound in run["top1_interval"])
        loss, ece = f"{run['loss']:.4f}", percent(run["calibration"]["ece"], 2)
        cost = [number(run.get(key)) for key in ("images_per_second", "parameters")]
        row = [run["letter"], run["workdir"], percent(run["top1"], 2), interval, loss, ece]
        table.append([*row, duration(run.get("seconds")), *cost])
    blocks = [f"{comparison['examples']:,} test examples", _aligned(table)]
    for i, row in enumerate(comparison["differences"], start=1):
        low, high = (f"{100 * bound:+.2f}" for bound in row["interval"])
        changes = [(r["recall"][i] - r["recall"][0], r["name"]) for r in per_class if r["support"]]
        changes = sorted((c for c in changes if c[0]), key=lambda c: -abs(c[0]))[:CHANGED_CLASSES]
        named = ", ".join(f"{_cell(name)} {100 * change:+.1f}" for change, name in changes)
        changed = f"recall changed most: {named}" if named else "no class's recall changed"
        blocks.append(
            f"{row['letter']} - A: {100 * row['difference']:+.2f} points (95% interval {low} to "
            f"{high}), {row['gained']} gained, {row['lost']} lost, McNemar p = {row['p_value']:.2g}"
            f"\n  {changed}"
        )
    config = [[key, *map(plain, values)] for key, values in comparison["config"].items()]
    head = ["config", *(run["letter"] for run in runs)]
    blocks.append(_aligned([head, *config]) if config else "configs are equal")
    return "\n\n".join(blocks)


def _aligned(rows: list[list[str]]) -> str:
    rows = [[_cell(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _cell(text: str) -> str:
    text = printable(text)
    return text if len(text) <= 48 else text[:47] + "…"


def define_flags() -> None:
    flags.DEFINE_string("output", "compare.html", "Where to write the page.")


def main(workdirs: list[str]) -> None:
    comparison = compare(workdirs)
    say(as_text(comparison))
    runs = comparison["runs"]
    plot = figures.figure(figures.intervals, runs, size=(512, 56 + 32 * len(runs)))
    path = report.write_page(Path(flags.FLAGS.output), "compare.html.j2", plot=plot, **comparison)
    say(f"\n{path}")
