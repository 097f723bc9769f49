"""sweep.html: what a sweep found, on one page in the style of the report."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from imgcls.evaluation import report
from imgcls.evaluation.figures import LIGHT, PALETTE, Axes, figure
from imgcls.run.logs import read_metrics
from imgcls.tuning.space import SCALES
from imgcls.tuning.summary import label, ranges

CURVES = 10  # trials whose learning curves are drawn
RESAMPLES = 20  # of the trials, for the interval of an importance
ENOUGH = 10  # trials, below which importance is not estimated
Rows = Sequence[dict[str, Any]]


def write_page(workdir: Path, results: dict[str, Any]) -> Path:
    """Writes WORKDIR/sweep.html from the results and from the trials' metrics.jsonl.

    Raises UserError where the file system refuses.
    """
    trials, keys = results["trials"], _keys(results)
    good = [row for row in trials if row["top1"] is not None]
    ranked = sorted(good, key=lambda row: (row["epoch"], row["top1"]), reverse=True)
    show = lambda draw, *data, size: figure(draw, *data, size=size) if good else None
    histories = [(row["trial"], _history(workdir, row["trial"])) for row in ranked[:CURVES]]
    return report.write_page(
        workdir / "sweep.html",
        "sweep.html.j2",
        results=results,
        best=next((row for row in results["finalists"] if row["top1"] is not None), None),
        label=label,
        keys=list(keys),
        best_so_far=show(_best_so_far, trials, size=(440, 230)),
        curves=show(_curves, histories, size=(440, 230)),
        slices={key: show(_slice, trials, key, keys[key], size=(440, 230)) for key in keys},
        parallel=show(_parallel, ranked[::-1], keys, size=(900, 300)) if len(keys) > 1 else None,
        importance=_importance(good, keys),
        finalists=_finalists_figure(results),
    )


def _history(workdir: Path, trial: int) -> list[tuple[float, float]]:
    rows = read_metrics(workdir / f"trials/{trial:03d}/metrics.jsonl")
    rows = [row for row in rows if row["split"] == "validation" and row.get("top1") is not None]
    return [(row["epoch"], row["top1"]) for row in rows]


def _keys(results: dict[str, Any]) -> dict[str, Any]:
    """The config keys that were varied, each with its (scale, low, high) or its choices."""
    found: dict[str, Any] = dict.fromkeys(key for row in results["trials"] for key in row["point"])
    known = ranges(results["space"])
    for key in found:
        if key in known:
            ((scale, bounds),) = known[key].items()
            found[key] = (scale, *bounds)
        else:
            have = [row["point"][key] for row in results["trials"] if key in row["point"]]
            order = lambda x: (isinstance(x, str), x if type(x) is list else [x])
            found[key] = list(dict.fromkeys(map(report.plain, sorted(have, key=order))))
    return found


def _positions(rows: Rows, key: str, axis: Any) -> np.ndarray:
    """Where the rows are on the axis of a key, in [0, 1]; NaN where they lack it."""

    def position(value: Any) -> float:
        if value is None:
            return math.nan
        if isinstance(axis, list):
            return (axis.index(report.plain(value)) + 0.5) / len(axis)
        there = SCALES[axis[0]][0]
        low, high = there(axis[1]), there(axis[2])
        inside = min(max(value, axis[1]), axis[2])  # the config's own may be outside
        return (there(inside) - low) / (high - low)

    return np.array([position(row["point"].get(key)) for row in rows])


def _ticks(axis: Any) -> tuple[list[float], list[str]]:
    """Places in [0, 1] and their labels. Names that are long are numbered: the table has them."""
    if isinstance(axis, list):
        labels = [text if len(text) <= 12 else f"#{i + 1}" for i, text in enumerate(axis)]
        return [(i + 0.5) / len(axis) for i in range(len(axis))], labels
    there, back = SCALES[axis[0]]
    low, high = there(axis[1]), there(axis[2])
    places = [0.0, 0.5, 1.0]
    return places, [f"{back(low + place * (high - low)):.3g}" for place in places]


def _best_so_far(axes: Axes, trials: Rows) -> str:
    """With the middle half of what as many trials, drawn at random, would have reached."""
    top1 = np.array([-1 if row["top1"] is None else 100 * row["top1"] for row in trials])
    best, count = np.maximum.accumulate(top1), np.arange(1, len(top1) + 1)
    draws = np.random.default_rng(0).choice(top1, size=(2000, len(top1)))
    low, high = np.percentile(np.maximum.accumulate(draws, axis=1), [25, 75], axis=0)
    floor = top1[top1 >= 0].min()
    axes.fill_between(count, low.clip(floor), high.clip(floor), color=LIGHT["line"], linewidth=0)
    axes.step(count, best.clip(floor), where="post", color=LIGHT["good"])
    axes.set(xlabel="trials", ylabel="best validation top-1, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y")
    return f"Best validation top-1 so far: {best[-1]:.2f}% after {len(top1)} trials"


def _curves(axes: Axes, histories: Sequence[tuple[int, list[tuple[float, float]]]]) -> str:
    for i, (trial, history) in reversed(list(enumerate(histories))):
        points = np.array(history).reshape(-1, 2)
        colour = PALETTE[i] if i < len(PALETTE) else LIGHT["muted"]
        axes.plot(points[:, 0], 100 * points[:, 1], color=colour, linewidth=1, label=f"{trial}")
    axes.set(xlabel="epoch", ylabel="validation top-1, %")
    axes.legend(loc="lower right", ncols=2, fontsize=7, reverse=True)
    axes.grid(axis="y")
    return f"Learning curves of the best {len(histories)} trials"


def _slice(axes: Axes, trials: Rows, key: str, axis: Any) -> str:
    """An isolation plot: a point a trial, and a cross below for one that failed."""
    x, top1 = _positions(trials, key, axis), [row["top1"] for row in trials]
    floor = 100 * min(value for value in top1 if value is not None)
    for state, colour, marker in (
        ("finalist", "good", "o"),
        ("out", "muted", "."),
        ("failed", "bad", "x"),
    ):
        at = [i for i, row in enumerate(trials) if row["state"] == state]
        y = [floor if top1[i] is None else 100 * top1[i] for i in at]
        axes.plot(x[at], y, marker, color=LIGHT[colour], label=state, clip_on=False)
    places, labels = _ticks(axis)
    axes.set_xticks(places, labels)
    axes.set(xlabel=key, ylabel="validation top-1, %", xlim=(0, 1))
    axes.grid(axis="y")
    return f"Validation top-1 by {key}"


def _parallel(axes: Axes, ranked: Rows, keys: dict[str, Any]) -> str:
    """A line a trial, the best tenth in colour and on top."""
    columns = [_positions(ranked, key, axis) for key, axis in keys.items()]
    top1 = np.array([row["top1"] for row in ranked])
    columns.append((top1 - top1.min()) / (np.ptp(top1) or 1))
    best = max(1, len(ranked) // 10)
    for i, line in enumerate(zip(*columns)):
        first = i >= len(ranked) - best
        style = {"color": LIGHT["good" if first else "muted"], "alpha": 1 if first else 0.4}
        axes.plot(range(len(columns)), line, linewidth=1.6 if first else 0.6, **style)
    ends = (f"{100 * top1.min():.1f}", f"{100 * top1.max():.1f}")
    ticks = [*map(_ticks, keys.values()), ((0.0, 1.0), ends)]
    for column, (places, labels) in enumerate(ticks):
        for place, text in zip(places, labels):
            axes.text(column, place, f" {text}", fontsize=7, color=LIGHT["muted"], va="center")
    names = [*(key.rpartition(".")[2] for key in keys), "top-1, %"]
    axes.set_xticks(range(len(names)), names)
    axes.set(yticks=[], ylim=(-0.05, 1.05))
    axes.grid(axis="x")
    return f"Parallel coordinates of {len(ranked)} trials, the best {best} in colour"


def _importance(good: Rows, keys: dict[str, Any]) -> Markup | None:
    """How much worse a random forest predicts top-1 without a key, with 90% bootstrap intervals.

    In the manner of fANOVA (Hutter et al. 2014), by permutation on the trials left out.
    """
    if len(good) < ENOUGH or len(keys) < 2 or not np.ptp([row["top1"] for row in good]):
        return None
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    x = np.nan_to_num(np.stack([_positions(good, k, axis) for k, axis in keys.items()], 1), nan=-1)
    y, rng, found = np.array([row["top1"] for row in good]), np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        chosen = rng.integers(len(y), size=len(y))
        left = np.setdiff1d(np.arange(len(y)), chosen)
        forest = RandomForestRegressor(50, random_state=0).fit(x[chosen], y[chosen])
        options = {"n_repeats": 3, "random_state": 0, "scoring": "neg_mean_squared_error"}
        found.append(permutation_importance(forest, x[left], y[left], **options).importances_mean)
    low, middle, high = np.percentile(found, [5, 50, 95], axis=0) / y.var()

    def draw(axes: Axes) -> str:
        order = np.argsort(-middle)
        for row, key in enumerate(order):
            axes.plot([low[key], high[key]], [row, row], color=LIGHT["good"], linewidth=2)
            axes.plot(middle[key], row, "o", color=LIGHT["good"], markersize=6)
        names = list(keys)
        axes.set_yticks(range(len(names)), [names[key] for key in order])
        axes.axvline(0, color=LIGHT["line"])
        axes.set(ylim=(len(names) - 0.5, -0.5), xlabel="squared error added, over the variance")
        return "Importance: " + ", ".join(f"{names[k]} {middle[k]:.2f}" for k in order)

    return figure(draw, size=(600, 60 + 30 * len(keys)))


def _finalists_figure(results: dict[str, Any]) -> Markup | None:
    rows = [row for row in results["finalists"] if row["top1"] is not None]

    def draw(axes: Axes) -> str:
        for y, row in enumerate(rows):
            seeds = [100 * seed["top1"] for seed in row["seeds"]]
            axes.plot(seeds, [y] * len(seeds), "|", color=LIGHT["muted"], markersize=8)
            if row["interval"]:
                bounds = [100 * bound for bound in row["interval"]]
                axes.plot(bounds, [y, y], color=LIGHT["good"], linewidth=2)
            axes.plot(100 * row["top1"], y, "o", color=LIGHT["good"], markersize=6)
        axes.set_yticks(range(len(rows)), [f"trial {row['trial']}" for row in rows])
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel="validation top-1, %")
        axes.grid(axis="x")
        return "; ".join(f"trial {row['trial']} {100 * row['top1']:.2f}%" for row in rows)

    return figure(draw, size=(600, 56 + 32 * len(rows))) if rows else None
