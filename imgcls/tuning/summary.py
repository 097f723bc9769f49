"""What a sweep found: results.json, tables for a paper, and what to do next."""

import itertools
import statistics
from typing import Any

from imgcls.config import flatten
from imgcls.errors import printable
from imgcls.evaluation.groups import percent, student_interval, welch
from imgcls.run import files
from imgcls.run.logs import read_metrics
from imgcls.run.workdir import read_json, write_json
from imgcls.tuning.plan import Sweep
from imgcls.tuning.space import SCALES, coordinates

SIGNIFICANT = 0.05
EDGE = 0.1  # share of a range, at either end
FEW = 0.2  # share of the successful trials


def finalists(sweep: Sweep) -> list[dict[str, Any]]:
    """The trials that were trained with fresh seeds, the best mean top-1 of validation first.

    Each has trial, point, seeds (a seed's top1 and loss), top1 and loss (means), interval (95%, of
    top1; None below three seeds). A trial with a seed that failed has no means and comes last.
    """
    rows = []
    for trial in sweep.finalists():
        seeds = [{"run": run} | scores(sweep, run) for run in sweep.seeded(trial)]
        number = int(trial.partition("/")[2])
        row = {"trial": number, "point": point(sweep, number), "seeds": seeds}
        top1, loss = ([seed[key] for seed in seeds] for key in ("top1", "loss"))
        mean = lambda values: None if None in values else statistics.fmean(values)
        row |= {"top1": mean(top1), "loss": mean(loss)}  # None: failed, or not finite
        rows.append(row | {"interval": None if None in top1 else student_interval(top1)})
    return rows


def point(sweep: Sweep, trial: int) -> dict[str, Any]:
    """The keys that are varied, with a trial's values; trial 0 has those of the config."""
    flat = flatten(sweep.plan["config"])
    return sweep.points[trial] or {k: flat[k] for p in sweep.points for k in p if k in flat}


def scores(sweep: Sweep, run: str) -> dict[str, Any]:
    """The last top1 and loss on validation, and their epoch; None where the run failed."""
    row = {"epoch": None, "top1": None, "loss": None}
    folder = sweep.folder(run)
    for found in read_metrics(folder / "metrics.jsonl"):
        if found["split"] == "validation" and found["epoch"] in sweep.rungs:
            row = {"epoch": int(found["epoch"])} | {key: found.get(key) for key in ("top1", "loss")}
    if (folder / "failed.json").exists():
        why = read_json(folder / "failed.json")
        row |= {"top1": None, "loss": None, "why": why["why"]}
    return row


def write(sweep: Sweep) -> dict[str, Any]:
    """Writes results.json, table.md and table.tex, and returns the results.

    They are a function of what the runs left: whoever writes them, they are the same.
    """
    for _ in sweep.stages():  # to know who was not out
        pass
    best = finalists(sweep)
    trials = []
    for i in range(len(sweep.points) if sweep.plan["space"] else 0):
        run = f"trials/{i:03d}"
        row = {"trial": i, "point": point(sweep, i)} | scores(sweep, run)
        state = "out" if run not in sweep.alive else "finalist"
        trials.append(row | {"state": "failed" if row["top1"] is None else state})
    good = [row for row in best if row["top1"] is not None]
    pairs = [
        {"trials": [a["trial"], b["trial"]]}
        | welch(*([seed["top1"] for seed in row["seeds"]] for row in (a, b)))
        for a, b in itertools.combinations(good, 2)
    ]
    results = {"space": sweep.plan["space"], "search": sweep.plan["search"], "trials": trials}
    results |= {"finalists": best, "pairs": pairs}
    if sweep.plan["test"] and good:
        winner = good[0]["seeds"]
        top1 = [read_json(sweep.folder(r["run"]) / "results.json")["top1"] for r in winner]
        mean, interval = statistics.fmean(top1), student_interval(top1)
        results["test"] = {"trial": good[0]["trial"], "top1": mean, "interval": interval}
    results["findings"] = findings(results)
    write_json(sweep.workdir / "results.json", results)
    files.write_bytes(sweep.workdir / "table.md", markdown(results).encode())
    files.write_bytes(sweep.workdir / "table.tex", latex(results).encode())
    return results


def findings(results: dict[str, Any]) -> list[str]:
    """What a person would conclude, a sentence each."""
    trials = {row["trial"]: row for row in results["trials"]}
    good = [row for row in results["finalists"] if row["top1"] is not None]
    said = []
    if not good:
        return ["No trial came to its end: see why in results.json."]
    best, seeds = good[0], len(good[0]["seeds"])
    interval = f" ({percent(best['interval'])})" if best["interval"] else ""
    over = f"mean of {seeds} seeds{interval}" if seeds > 1 else "one seed"
    said.append(f"{label(best)} is best: {100 * best['top1']:.2f}% on validation, {over}.")
    alike = [
        sum(pair["trials"]) - best["trial"]
        for pair in results["pairs"]
        if best["trial"] in pair["trials"]
        and (pair["p_value"] is None or pair["p_value"] > SIGNIFICANT)
    ]
    if 0 in alike:
        said.append("The config as it is, trial 0, is as good.")
    if alike and seeds == 1:
        said.append("One seed cannot tell trials apart: --seeds=3 or more of another sweep can.")
    elif alike:
        named = ", ".join(f"{trial}" for trial in [best["trial"], *alike])
        said.append(f"Trials {named} cannot be told apart with {seeds} seeds.")
    for key, spec in ranges(results["space"]).items():
        said += _edge(key, spec, best["point"])
        said += _failures(key, list(trials.values()))
    if trials and len(trials) < 10 and len(coordinates(results["space"])) > 1:
        said.append(f"{len(trials)} trials say little about each key: add more with --trials.")
    if tested := results.get("test"):
        interval = f" ({percent(tested['interval'])})" if tested["interval"] else ""
        said.append(f"Trial {tested['trial']} has {100 * tested['top1']:.2f}% on test{interval}.")
    return said


def label(row: dict[str, Any]) -> str:
    values = ", ".join(f"{key}={value}" for key, value in row["point"].items())
    return f"Trial {row['trial']} ({printable(values) if row['trial'] else 'the config as it is'})"


def ranges(space: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The keys that have ranges, wherever in the space."""
    found = coordinates(space)
    return {name.rpartition("].")[2]: spec for name, spec in found.items() if type(spec) is dict}


def _edge(key: str, spec: dict[str, Any], point: dict[str, Any]) -> list[str]:
    if key not in point:
        return []
    ((scale, bounds),) = spec.items()
    inside = min(max(point[key], bounds[0]), bounds[1])  # the config's own may be outside
    low, value, high = (SCALES[scale][0](x) for x in (bounds[0], inside, bounds[1]))
    if EDGE < (value - low) / (high - low) < 1 - EDGE:
        return []
    side = "lower" if value - low < high - value else "upper"
    return [f"The best value of {key}, {point[key]}, is at the {side} edge of its range."]


def _failures(key: str, trials: list[dict[str, Any]]) -> list[str]:
    have = [row for row in trials if key in row["point"]]
    failed = [row["point"][key] for row in have if row["top1"] is None]
    others = [row["point"][key] for row in have if row["top1"] is not None]
    told = f"{len(failed)} of {len(trials)} trials failed, all at {key}"
    few = FEW * len(others)
    if len(failed) > 1 and sum(value >= min(failed) for value in others) <= few:
        return [f"{told} of at least {min(failed)}."]
    if len(failed) > 1 and sum(value <= max(failed) for value in others) <= few:
        return [f"{told} of at most {max(failed)}."]
    return []


def _rows(results: dict[str, Any]) -> list[list[str]]:
    """The finalists, in percent, under their heads."""
    keys = dict.fromkeys(key for row in results["finalists"] for key in row["point"])
    rows = [["trial", *keys, "validation top-1, %", "95% interval", "seeds"]]
    for row in results["finalists"]:
        values = [str(row["point"].get(key, "")) for key in keys]
        top1 = "failed" if row["top1"] is None else f"{100 * row['top1']:.2f}"
        interval = percent(row["interval"]) if row["interval"] else ""
        rows.append([str(row["trial"]), *values, top1, interval, str(len(row["seeds"]))])
    return rows


def markdown(results: dict[str, Any]) -> str:
    head, *rows = _rows(results)
    lines = [head, ["---"] * len(head), *rows]
    escaped = [[cell.replace("|", "&#124;") for cell in row] for row in lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


def latex(results: dict[str, Any]) -> str:
    """A tabular environment, for \\usepackage{booktabs}."""
    escape = lambda cell: "".join("\\" + c if c in "&%$#_{}" else c for c in cell)
    head, *rows = ([escape(cell) for cell in row] for row in _rows(results))
    body = [" & ".join(row) + r" \\" for row in (head, *rows)]
    lines = [r"\begin{tabular}{" + "l" * len(head) + "}", r"\toprule", body[0], r"\midrule"]
    return "\n".join([*lines, *body[1:], r"\bottomrule", r"\end{tabular}", ""])
