"""Rewrites the tables of README.md, benchmarks/README.md, docs/recipes.md and docs/cpu.md.

python benchmarks/tables.py

A table stands between the comments <!-- name --> and <!-- /name -->. Its figures come from
benchmarks/results/*.json and benchmarks/trials.jsonl, which also name machines and commits.
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import common

from imgcls.run.workdir import read_json

Rows = list[list[Any]]
TRIALS = common.ROOT / "benchmarks" / "trials.jsonl"


def short(machine: str) -> str:
    """Such as "Intel Xeon @ 2.50GHz (AVX-512, AVX2)": memory and the usual two cores left out."""
    return re.sub(r"\(R\)| Processor|^2 cores of |, \d+ GiB", "", machine)


def _summaries(results: Path) -> list[dict[str, Any]]:
    """What time_to_accuracy.py has written, by name of config."""
    summaries = [{"file": path.stem, **read_json(path)} for path in sorted(results.glob("*.json"))]
    return [summary for summary in summaries if "top1" in summary]


def _accuracy(summary: dict[str, Any]) -> list[str]:
    """A config's name, top-1, its interval, and seconds."""
    top1, seconds, runs = summary["top1"], summary["seconds"], summary["seeds"]
    name = f"`{summary['name']}`" + (f" ({summary['note']})" if summary["note"] else "")
    accuracy = f"{top1['mean']:.2%}"
    if len(runs) == 1:
        accuracy += f" ({round(runs[0]['top1'] * runs[0]['examples'])}/{runs[0]['examples']})"
    interval = " to ".join(f"{100 * bound:.2f}" for bound in top1["interval"] or ())
    time = f"{seconds['command'] or seconds['inside']:.0f} s"
    time += "" if seconds["command"] else " without imports"
    return [name, accuracy, f"{interval or 'none'} (over {top1['over']})", time]


def results(folder: Path = common.RESULTS) -> str:
    """The README's: one file per config, and a line that says on which machines."""
    rows, machines = [["config", "test top-1", "95% interval", "time"]], {}
    for summary in _summaries(folder):
        if summary["file"] == summary["name"]:
            rows.append(_accuracy(summary))
            machines.setdefault(short(summary["machine"]), []).append(f"`{summary['name']}`")
    places = "; ".join(f"{', '.join(names)}: {machine}" for machine, names in machines.items())
    where = "[benchmarks/results](benchmarks/results) has commits, versions and seeds"
    return f"{common.table(rows)}\n\nMachines have two CPU cores. {places}. {where}."


def accuracy() -> str:
    head = ["config", "test top-1", "95% interval", "time", "images/s", "machine"]
    return common.table(
        [head]
        + [
            [*_accuracy(s), f"{s['images_per_second']:.0f}", short(s["machine"])]
            for s in _summaries(common.RESULTS)
        ]
    )


def _parts(name: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(what, machine, figures) of each part of results/<name>.json."""
    parts = read_json(common.RESULTS / f"{name}.json")
    return [(key.split(", ")[0], short(part["machine"]), part) for key, part in parts.items()]


def train_step() -> str:
    columns = {
        "float32 / PyTorch (aim 1.1)": "float32, against PyTorch float32",
        "bfloat16 / PyTorch (aim 0.8)": "bfloat16, against PyTorch bfloat16",
        "float32 / plain Flax (aim 3)": "float32, against plain Flax",
        "float32 / Keras on JAX": "float32, against Keras on JAX",
    }
    rows = [["network", "machine", "float32 images/s", *columns]]
    for network, machine, part in _parts("train_step"):
        ratios = [part["ratios"].get(key) for key in columns.values()]
        rate = f"{part['images_per_second']['imgcls-float32']:.0f}"
        cells = [f"{ratio:.2f}" if ratio else "" for ratio in ratios]
        rows.append([f"`{network}`", machine, rate, *cells])
    return common.table(rows)


def features() -> str:
    columns = {
        "float32 / PyTorch (aim 1.2; vit, convnext 0.9)": "float32, against PyTorch float32",
        "bfloat16 / PyTorch (aim 0.9)": "bfloat16, against PyTorch bfloat16",
    }
    rows = [["network", "machine", "float32 images/s", "bfloat16 images/s", *columns]]
    measured = (common.RESULTS / "features.json").exists()
    for network, machine, part in _parts("features") if measured else ():
        rates = [part["images_per_second"].get(f"imgcls-{d}") for d in ("float32", "bfloat16")]
        ratios = [part["ratios"].get(key) for key in columns.values()]
        cells = [f"{rate:.0f}" if rate else "" for rate in rates]
        cells += [f"{ratio:.2f}" if ratio else "" for ratio in ratios]
        rows.append([f"`{network}`", machine, *cells])
    return common.table(rows)


def around_the_step() -> str:
    """Evaluation, an epoch, a start, memory and augmentation: what runs around the bare step."""

    def parts(name: str) -> list[tuple[str, dict[str, Any]]]:
        return [(machine, part) for what, machine, part in _parts(name) if what == "cifar10"]

    columns = {"evaluation / PyTorch (aim 1.0)": {}, "bare steps / epoch (aim 0.95)": {}}
    evaluation, epoch = columns.values()
    for machine, part in parts("evaluation"):
        if ratio := part["ratios"].get("float32, against PyTorch float32"):
            evaluation[machine] = f"{ratio:.2f}"
    for machine, part in parts("epoch"):
        epoch[machine] = f"{part['ratio']:.2f}"
    cold = columns.setdefault("cold start less compilation (aim 8 s)", {})
    warm = columns.setdefault("warm start (aim 6 s)", {})
    memory = columns.setdefault("peak memory (aim 3 GiB); in epochs 2, 3, 4", {})
    for machine, part in parts("startup"):
        medians, peaks = part["medians"], part["peak_mib"]
        seconds, compilation = (
            medians["cold"][key] for key in ("begins_without_compilation", "compilation")
        )
        cold[machine] = f"{seconds:.1f} s and {compilation:.1f} s"
        warm[machine] = f"{medians['warm']['first_step_begins']:.1f} s"
        later = ", ".join(str(peaks[f"epoch {epoch}"]) for epoch in (2, 3, 4))
        memory[machine] = f"{max(peaks.values()) / 1024:.1f} GiB; {later} MiB"
    for name, aim in (("flip, translate, cutout", "3%"), ("rotate, zoom", "15%")):
        cost = columns.setdefault(f"{name} (aim {aim})", {})
        for machine, part in parts("augmentation"):
            low, median, high = _costs(part["seconds"][name], part["seconds"]["none"])
            cost[machine] = f"{median:+.1%} ({low:+.0%} to {high:+.0%})"
    machines = dict.fromkeys(machine for column in columns.values() for machine in column)
    rows = [
        [machine, *(column.get(machine, "") for column in columns.values())] for machine in machines
    ]
    return common.table([["machine", *columns], *rows])


def _costs(seconds: list[float], bare: list[float]) -> tuple[float, float, float]:
    """The lowest, the median and the highest of what the turns cost over the bare step."""
    costs = [with_it / without - 1 for with_it, without in zip(seconds, bare)]
    return min(costs), statistics.median(costs), max(costs)


def growth() -> str:
    rows = [["sweep", "widths", "machine", "images/s at each size", "peak memory"]]
    for sweep, machine, part in _parts("scaling"):
        points = part["points"]
        rates = ", ".join(f"{p[sweep]}: {p['images_per_second']:.0f}" for p in points)
        peak = max(point["peak_mib"] for point in points) / 1024
        widths = ", ".join(map(str, part["widths"]))
        rows.append([sweep.replace("_", " "), widths, machine, rates, f"{peak:.1f} GiB"])
    return common.table(rows)


def accelerators() -> str:
    head = ["step", "batch", "memory a chip", "all-reduced", "at least, by FLOPs", "by bandwidth"]
    rows, parts = [head], read_json(common.RESULTS / "accelerators.json")
    for name, part in parts.items():
        least = [f"{part['milliseconds'][kind]:.2f} ms" for kind in ("FLOPs", "bandwidth")]
        moved = f"{sum(part['MB_between_chips'].values()):.2f} MB"
        rows.append([name, part["batch"], f"{part['GiB']:.2f} GiB", moved, *least])
    one = parts["cifar10 on v5e-1"]
    for chip, most in {"H100": 989e12, "T4, in float32": 8.1e12}.items():  # FLOP/s, of data sheets
        least = f"{1e3 * one['flops'] / most:.2f} ms"
        rows.append([f"cifar10 on one {chip}", one["batch"], "", "", least, ""])
    return common.table(rows)


def trials(network: str, path: Path = TRIALS) -> str:
    """A network's trials below the recipe (bold) that each of them changes."""
    trials = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    trials = [trial for trial in trials if trial["network"] == network]
    rows = [["change", "top-1", "time", "verdict"]]
    for base in trials:
        if base["base"] is not None:
            continue
        seeds = ", ".join(f"{value:.2f}" for value in base["seeds"].values()) or "1 seed"
        top1 = f"**{base['top1']:.2f}%** ({seeds})"
        rows.append([f"**{base['change']}**", top1, _time(base), base["verdict"]])
        for trial in trials:
            if trial["base"] == base["name"]:
                difference = _difference(trial, base)
                rows.append([trial["change"], difference, _time(trial), trial["verdict"]])
    return common.table(rows)


def _time(trial: dict[str, Any]) -> str:
    seconds = trial["seconds"]
    if seconds is None:
        return ""
    times = ", ".join(
        f"{value:,}" for value in (seconds if isinstance(seconds, list) else [seconds])
    )
    return f"{times} s" + (", 1 core" if trial["cores"] == 1 else "")


def _difference(trial: dict[str, Any], base: dict[str, Any]) -> str:
    """Percentage points by which top-1 is above the base's, of the seeds that both have."""
    points = lambda value: f"{round(value, 2) + 0.0:+.2f}"
    seeds = [seed for seed in trial["seeds"] if seed in base["seeds"]]
    each = [trial["seeds"][seed] - base["seeds"][seed] for seed in seeds]
    if trial["top1"] is None and not each:
        return ""
    all_of_both = len(seeds) == len(trial["seeds"]) == len(base["seeds"])
    if not each or (all_of_both and trial["top1"] is not None):
        mean = trial["top1"] - base["top1"]
    else:
        mean = statistics.fmean(each)
    over = f"seed {seeds[0]}" if len(seeds) == 1 else ", ".join(map(points, each))
    return f"{points(mean)} ({over or '1 seed'})"


def measured(name: str) -> str:
    """A table of results/cpu.json, whose cells are written there."""
    return common.table(read_json(common.RESULTS / "cpu.json")[name]["rows"])


def documents() -> dict[Path, dict[str, str]]:
    """The files, and the tables of each by name."""
    networks = {
        "cifar10_half": "cifar10 at half width",
        "cifar10": "cifar10",
        "cifar10_wide": "cifar10_wide",
        "cifar10_resnet18": "cifar10_resnet18",
        "mnist": "mnist",
    }
    tables = (train_step, features, around_the_step, growth, accelerators, accuracy)
    return {
        common.ROOT / "README.md": {"results": results()},
        common.ROOT / "benchmarks/README.md": {table.__name__: table() for table in tables},
        common.ROOT / "docs/recipes.md": {name: trials(of) for name, of in networks.items()},
        common.ROOT / "docs/cpu.md": {
            name: measured(name) for name in read_json(common.RESULTS / "cpu.json")
        },
    }


def rewritten(text: str, tables: dict[str, str]) -> str:
    """The text with new tables between their markers.

    Raises:
        ValueError: a table has no markers, or markers have no table.
    """
    named = re.findall(r"^<!-- (\w+) -->$", text, re.MULTILINE)
    if sorted(named) != sorted(tables):
        raise ValueError(f"the text has the markers {named}, and the tables are {[*tables]}")
    for name, table in tables.items():
        pattern = re.compile(f"<!-- {name} -->.*<!-- /{name} -->", re.DOTALL)
        text = pattern.sub(lambda _, new=f"<!-- {name} -->\n{table}\n<!-- /{name} -->": new, text)
    return text


def main() -> None:
    for path, tables in documents().items():
        path.write_text(rewritten(path.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main()
