"""Rewrites the table of results in README.md from the files of time_to_accuracy.py.

python benchmarks/readme_table.py
"""

import re
from pathlib import Path
from typing import Any

import common

from imgcls.run.workdir import read_json

BEGIN, END = "<!-- results -->", "<!-- /results -->"
HEAD = ["config", "test top-1", "95% interval", "over", "time", "images/s", "commit"]


def results_table(results: Path, configs: Path) -> str:
    """A row for each config; below, the machines and the versions that the figures come from."""
    rows, sources = [HEAD], []
    for config in sorted(path.stem for path in configs.glob("*.py")):
        path = results / f"{config}.json"
        if not path.exists():
            rows.append([f"`{config}`", "not run to the end yet", *[""] * (len(HEAD) - 2)])
            continue
        summary = read_json(path)
        rows.append(_row(summary))
        versions = ", ".join(f"{k} {v}" for k, v in summary["versions"].items())
        sources.append((f"`{config}`", f"{summary['machine']}; {versions}"))
    notes = [
        f"{', '.join(name for name, other in sources if other == source)}: {source}."
        for source in dict.fromkeys(source for _, source in sources)
    ]
    return "\n\n".join([common.table(rows), *notes])


def _row(summary: dict[str, Any]) -> list[str]:
    top1, seconds, runs = summary["top1"], summary["seconds"], summary["seeds"]
    name = f"`{summary['name']}`" + (f" ({summary['note']})" if summary["note"] else "")
    accuracy = f"{top1['mean']:.2%}"
    if len(runs) == 1:
        (run,) = runs
        accuracy += f" ({round(run['top1'] * run['examples'])}/{run['examples']})"
    interval = " to ".join(f"{100 * bound:.2f}" for bound in top1["interval"])
    time = f"{seconds['command'] or seconds['inside']:.0f} s"
    time += "" if seconds["command"] else " inside"
    commit = (summary["git_commit"] or "unknown")[:9]
    commit += "+" if (summary["git_commit"] or "").endswith("+") else ""
    rate = f"{summary['images_per_second']:.0f}"
    return [name, accuracy, interval, top1["over"], time, rate, commit]


def rewritten(readme: str, table: str) -> str:
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if not pattern.search(readme):
        raise ValueError(f"the README has no {BEGIN} markers")
    return pattern.sub(lambda _: f"{BEGIN}\n{table}\n{END}", readme)


def main() -> None:
    path = common.ROOT / "README.md"
    table = results_table(common.RESULTS, common.ROOT / "configs")
    path.write_text(rewritten(path.read_text(encoding="utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main()
