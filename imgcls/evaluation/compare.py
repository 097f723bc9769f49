"""Is one run better than another? Paired statistics from the saved predictions.

    python -m imgcls compare DIR_A DIR_B [DIR_C ...] [--output=compare.html]

Every run is compared with the first, example by example, on the terminal and on a page. Intervals
and p-values answer for the choice of test examples. They know nothing of the training seed: a
difference that another seed undoes is none, however small its p.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from imgcls.errors import UserError, printable
from imgcls.evaluation import figures, report
from imgcls.evaluation.report import Run, duration, percent, plain
from imgcls.run.logs import say

RESAMPLES = 10_000
CHANGED_CLASSES = 5  # named on the terminal; the page has them all


def compare(workdirs: Sequence[str | Path]) -> dict[str, Any]:
    """Compares finished runs by their results.json, predictions.npz and config.json.

    Returns:
        examples;
        runs: per run its letter (A, B, ...), workdir, top1, top1_interval, top5, loss, ece,
            seconds, images_per_second and parameters (these None where results.json lacks them);
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
    first = runs[0]
    for run in runs[1:]:
        _check_same_examples(first, run)
    keys = dict.fromkeys(key for run in runs for key in run.config)
    values = {key: [run.config.get(key) for run in runs] for key in keys}
    return {
        "examples": len(first.labels),
        "runs": [_summary(index, run) for index, run in enumerate(runs)],
        "differences": [_difference(index, first, runs[index]) for index in range(1, len(runs))],
        "per_class": [
            {"name": rows[0]["name"], "support": rows[0]["support"]}
            | {"recall": [row["recall"] for row in rows]}
            for rows in zip(*(run.results["per_class"] for run in runs))
        ],
        "config": {key: v for key, v in values.items() if any(other != v[0] for other in v)},
    }


def _check_same_examples(a: Run, b: Run) -> None:
    names = [[row["name"] for row in run.results["per_class"]] for run in (a, b)]
    if names[0] != names[1]:
        difference = "their classes differ"
    elif len(a.ids) != len(b.ids):
        difference = f"{len(a.ids)} and {len(b.ids)} examples"
    elif (differing := np.flatnonzero((a.ids != b.ids) | (a.labels != b.labels))).size:
        (i, *_) = differing
        each = [f"{str(run.ids[i])!r} of class {names[0][run.labels[i]]!r}" for run in (a, b)]
        difference = f"example {i} is {each[0]} and {each[1]}"
    else:
        return
    raise UserError(
        f"{a.workdir} and {b.workdir} were tested on different examples ({difference}): "
        "compare runs evaluated on the same test split"
    )


def _summary(index: int, run: Run) -> dict[str, Any]:
    summary = {"letter": figures.run_letter(index), "workdir": str(run.workdir)}
    summary |= {key: run.results[key] for key in ("top1", "top1_interval", "top5", "loss")}
    summary["ece"] = run.results["calibration"]["ece"]
    cost = ("seconds", "images_per_second", "parameters")
    return summary | {key: run.results.get(key) for key in cost}


def _difference(index: int, a: Run, b: Run) -> dict[str, Any]:
    from scipy.stats import binomtest

    right_a, right_b = (run.logits.argmax(axis=1) == run.labels for run in (a, b))
    n, gained, lost = len(a.labels), int((right_b > right_a).sum()), int((right_a > right_b).sum())
    # Paired examples count +1, -1 or 0, so resampling n of them is one multinomial draw.
    shares = [gained / n, lost / n, (n - gained - lost) / n]
    draws = np.random.default_rng(0).multinomial(n, shares, size=RESAMPLES)
    low, high = np.percentile((draws[:, 0] - draws[:, 1]) / n, [2.5, 97.5])
    return {
        "letter": figures.run_letter(index),
        "difference": (gained - lost) / n,
        "interval": [float(low), float(high)],
        "gained": gained,
        "lost": lost,
        "p_value": float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
    }


def as_text(comparison: dict[str, Any]) -> str:
    """The comparison for a terminal."""
    head = ["", "workdir", "top-1 %", "95% interval", "loss", "ECE %"]
    head = [*head, "time", "images/s", "parameters"]
    runs = [
        [
            run["letter"],
            run["workdir"],
            percent(run["top1"], 2),
            " to ".join(percent(bound, 2) for bound in run["top1_interval"]),
            f"{run['loss']:.4f}",
            percent(run["ece"], 2),
            duration(run["seconds"]),
            _count(run["images_per_second"]),
            _count(run["parameters"]),
        ]
        for run in comparison["runs"]
    ]
    blocks = [f"{comparison['examples']:,} test examples", _table([head, *runs])]
    for index, row in enumerate(comparison["differences"], start=1):
        low, high = (f"{100 * bound:+.2f}" for bound in row["interval"])
        blocks.append(
            f"{row['letter']} - A: {100 * row['difference']:+.2f} points (95% interval {low} to "
            f"{high}), {row['gained']} gained, {row['lost']} lost, McNemar p = {row['p_value']:.2g}"
        )
        blocks[-1] += f"\n  {_changed_classes(comparison['per_class'], index)}"
    letters = [run["letter"] for run in comparison["runs"]]
    config = [[key, *map(plain, values)] for key, values in comparison["config"].items()]
    blocks.append(_table([["config", *letters], *config]) if config else "configs are equal")
    return "\n\n".join(blocks)


def _changed_classes(per_class: list[dict[str, Any]], index: int) -> str:
    changes = [(r["recall"][index] - r["recall"][0], r["name"]) for r in per_class if r["support"]]
    changes = sorted((c for c in changes if c[0]), key=lambda c: -abs(c[0]))[:CHANGED_CLASSES]
    named = ", ".join(f"{_cell(name)} {100 * change:+.1f}" for change, name in changes)
    return f"recall changed most: {named}" if named else "no class's recall changed"


def _table(rows: list[list[str]]) -> str:
    rows = [[_cell(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _cell(text: str) -> str:
    text = printable(text)
    return text if len(text) <= 48 else text[:47] + "…"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


POSITIONAL = True  # arguments are not only flags


def define_flags() -> None:
    flags.DEFINE_string("output", "compare.html", "Where to write the page.")


def main(workdirs: list[str]) -> None:
    comparison = compare(workdirs)
    say(as_text(comparison))
    plot = figures.intervals([(run["top1"], *run["top1_interval"]) for run in comparison["runs"]])
    page = report.render("compare.html.j2", plot=plot, **comparison)
    say(f"\n{report.write_page(Path(flags.FLAGS.output), page)}")
