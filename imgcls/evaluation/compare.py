"""Is one run better than another? Paired statistics from the saved predictions.

    python -m imgcls compare DIR_A DIR_B [DIR_C ...] [--output=compare.html]
    python -m imgcls compare sweeps/a/seeds/* -- sweeps/b/seeds/*

Every run is compared with the first, example by example, on the terminal and on a page. Intervals
and p-values answer for the choice of test examples. They know nothing of the training seed: a
difference that another seed undoes is none, however small its p.

A "--" between them makes two groups, each of one config with several seeds. Their comparison
answers for other seeds, too. It has no page.
"""

from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np
from absl import flags
from scipy.stats import binomtest

from imgcls.config import flatten
from imgcls.errors import UserError, visible
from imgcls.evaluation import figures, groups, report
from imgcls.evaluation.report import Run, duration, number, percent, plain
from imgcls.keys import HARMLESS
from imgcls.run.logs import say

RESAMPLES = 10_000
CHANGED_CLASSES = 5  # named on the terminal; the page has them all
LETTERS = [a + b for a in ("", *ascii_uppercase) for b in ascii_uppercase]
POSITIONAL = GROUPS = True  # arguments are not only flags, and may come in groups


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
    for run in runs:
        _check_comparable(runs[0], run)
    named = [({"letter": letter}, run) for letter, run in zip(LETTERS, runs)]
    classes = zip(*(run.results["per_class"] for run in runs))
    return {
        "examples": len(runs[0].labels),
        "runs": [run.results | letter | {"workdir": str(run.workdir)} for letter, run in named],
        "differences": [letter | _difference(runs[0], run) for letter, run in named[1:]],
        "per_class": [
            {"name": a["name"], "support": a["support"], "recall": [x["recall"] for x in (a, *b)]}
            for a, *b in classes
        ],
        "config": _differing(runs),
    }


def _differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    configs = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: [config.get(key) for config in configs] for key in keys}
    return {key: v for key, v in values.items() if any(other != v[0] for other in v)}


def read_groups(a: Sequence[str | Path], b: Sequence[str | Path]) -> list[list[Run]]:
    """The finished runs of two groups.

    Raises:
        UserError: a group is empty, has several configs or a seed twice, a workdir is unusable, or
            test examples differ.
    """
    if not (a and b) or "-" in b:
        raise UserError(
            "name the runs of two groups: python -m imgcls compare DIR_A1 DIR_A2 -- DIR_B1 DIR_B2"
        )
    read = [[report.read_run(workdir) for workdir in group] for group in (a, b)]
    for first, *others in read:
        for run in (first, *others):
            _check_comparable(read[0][0], run)
            if keys := _differing([first, run]).keys() - {"seed", *HARMLESS}:
                raise UserError(
                    f"{first.workdir} and {run.workdir} differ in config.{min(keys)}: the runs of "
                    "a group may differ in their seeds alone"
                )
        seeds = [run.config.get("seed") for run in (first, *others)]
        if len(set(seeds)) < len(seeds):
            raise UserError(
                f"the seeds in the group of {first.workdir} are {seeds}: each may come only once"
            )
    return read


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
    return "\n\n".join([*blocks, _config_text(comparison["config"], [r["letter"] for r in runs])])


def _config_text(differing: dict[str, list[Any]], letters: Sequence[str]) -> str:
    rows = [[key, *map(plain, values)] for key, values in differing.items()]
    return _aligned([["config", *letters], *rows]) if rows else "configs are equal"


def _aligned(rows: list[list[str]]) -> str:
    rows = [[_cell(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _cell(text: str) -> str:
    text = visible(text, "")
    return text if len(text) <= 48 else text[:47] + "…"


def define_flags() -> None:
    flags.DEFINE_string("output", "compare.html", "Where to write the page.")


def _say_groups(a: list[str], b: list[str]) -> None:
    read = read_groups(a, b)
    rows = [
        [letter, str(run.workdir), percent(run.results["top1"], 2)]
        for letter, group in zip("AB", read)
        for run in group
    ]
    differing = _differing([group[0] for group in read])
    differing.pop("seed", None)
    examples = f"{len(read[0][0].labels):,} test examples"
    blocks = [examples, _aligned([["", "workdir", "top-1 %"], *rows])]
    blocks.append(groups.as_text(groups.compare_groups(*read)))
    say("\n\n".join([*blocks, _config_text(differing, "AB")]))


def main(workdirs: list[str]) -> None:
    with report.shown(workdirs):
        if "-" in workdirs:  # a "--" was typed
            if not flags.FLAGS["output"].using_default_value:
                raise UserError("--output: the comparison of groups has no page, leave it out")
            middle = workdirs.index("-")
            return _say_groups(workdirs[:middle], workdirs[middle + 1 :])
        comparison = compare(workdirs)
        say(as_text(comparison))
        runs, path = comparison["runs"], Path(flags.FLAGS.output)
        plot = figures.figure(figures.intervals, runs, size=(512, 56 + 32 * len(runs)))
        report.write_page(path, "compare.html.j2", plot=plot, **comparison)
        say(f"\n{path}")
