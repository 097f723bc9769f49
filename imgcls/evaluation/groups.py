"""Is one config better than another? Answers that know the variance between training seeds."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from imgcls.evaluation.report import Run

POWER = 0.8  # chance to find a difference of the size seen, at p = 0.05


def student_interval(values: Sequence[float]) -> list[float] | None:
    """The 95% confidence interval of a mean of normal values: [low, high].

    None of fewer than three values, where it would be nine standard errors wide or more.
    """
    if len(values) < 3:
        return None
    mean, n = statistics.fmean(values), len(values)
    half = statistics.stdev(values) / n**0.5 * float(stats.t.ppf(0.975, n - 1))
    return [mean - half, mean + half]


def welch(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Compares two groups of normal values of different variance (Welch 1947).

    Returns:
        difference of the means, b less a; its 95% interval and two-sided p_value; effect, the
        difference in standard deviations (Cohen's d); runs_needed, how many a group would have to
        have to find such a difference with a chance of `POWER`. All but the difference are None
        where a group has fewer than two values or neither varies.
    """
    difference = statistics.fmean(b) - statistics.fmean(a)
    found: dict[str, Any] = {"difference": difference, "interval": None, "p_value": None}
    found |= {"effect": None, "runs_needed": None}
    if min(len(a), len(b)) < 2 or not (variance := statistics.variance(a) + statistics.variance(b)):
        return found
    # SciPy's own test warns of groups whose values are equal, as those of few examples often are.
    parts = [(statistics.variance(group) / len(group), len(group) - 1) for group in (a, b)]
    error = math.sqrt(sum(part for part, _ in parts))
    freedom = error**4 / sum(part**2 / others for part, others in parts)
    half = error * float(stats.t.ppf(0.975, freedom))
    effect = difference / math.sqrt(variance / 2)
    if effect:
        z = stats.norm.ppf(0.975) + stats.norm.ppf(POWER)
        found["runs_needed"] = max(math.ceil(2 * (z / effect) ** 2) + 1, 3)  # + 1: t is wider
    found |= {"interval": [difference - half, difference + half], "effect": effect}
    return found | {"p_value": 2 * float(stats.t.sf(abs(difference) / error, freedom))}


def compare_groups(a: Sequence[Run], b: Sequence[Run]) -> dict[str, Any]:
    """Compares two groups of runs that were tested on the same examples.

    Returns:
        top1: of each run, by group;
        seeds: `welch` of them, which answers for other seeds on these examples;
        examples: the same difference with its 95% interval over other examples from the same
            source, for these seeds: paired, by the mean over each group's runs.
    """
    right = [np.array([r.logits.argmax(1) == r.labels for r in group], float) for group in (a, b)]
    top1 = [group.mean(axis=1).tolist() for group in right]
    paired = right[1].mean(axis=0) - right[0].mean(axis=0)
    half = 1.96 * paired.std(ddof=1) / len(paired) ** 0.5
    mean = float(paired.mean())
    return {
        "top1": dict(zip("AB", top1)),
        "seeds": welch(*top1),
        "examples": {"difference": mean, "interval": [mean - half, mean + half]},
    }


def as_text(comparison: dict[str, Any]) -> str:
    """The comparison for a terminal, in points of top-1."""
    lines, seeds = [], comparison["seeds"]
    for name, top1 in comparison["top1"].items():
        interval = student_interval(top1)
        told = f"95% interval {percent(interval)}" if interval else "no interval below 3 runs"
        lines.append(f"{name}: {100 * statistics.fmean(top1):.2f}% over {len(top1)} runs, {told}")
    line = f"B - A: {100 * seeds['difference']:+.2f} points"
    if seeds["interval"]:
        line += f" (95% interval over seeds {percent(seeds['interval'], '+')}, Welch p = "
        line += f"{seeds['p_value']:.2g}, {seeds['effect']:+.1f} standard deviations)"
    lines.append(line)
    lines.append(f"over test examples: {percent(comparison['examples']['interval'], '+')}, paired")
    if (needed := seeds["runs_needed"]) and seeds["p_value"] > 0.05:
        runs = f"about {needed} runs a group" if needed < 1000 else "more than 1,000 runs a group"
        lines.append(f"to tell such a difference from chance, {runs} would be needed")
    return "\n".join(lines)


def percent(interval: Sequence[float], sign: str = "") -> str:
    low, high = (f"{100 * bound:{sign}.2f}" for bound in interval)
    return f"{low} to {high}"
