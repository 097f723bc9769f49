"""What a sweep says while it runs."""

import contextlib
import json
import math
import sys
from typing import Any

from tqdm import tqdm

from imgcls.run.logs import read_metrics, say
from imgcls.tuning.plan import FAILED, Job, Sweep


class Progress:
    """On a terminal a bar for the sweep and one for each trial at work; elsewhere plain lines.

    The sweep's bar counts epochs. How many there will be is an estimate: trials may fail.
    """

    def __init__(self, sweep: Sweep, workers: int):
        self._sweep, self._done = sweep, 0
        self._best: tuple[Any, str] = (FAILED, "")
        self._terminal = sys.stderr.isatty()
        bar = lambda **options: tqdm(
            disable=not self._terminal, dynamic_ncols=True, leave=False, **options
        )
        self._all = bar(total=self._total(), desc="sweep", unit=" epochs", position=0)
        epochs = sweep.rungs[-1]
        self._bars = [bar(total=epochs, bar_format=FORMAT, position=i + 1) for i in range(workers)]

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        for bar in (*self._bars, self._all):
            bar.close()

    def _total(self) -> int:
        p, before, total = self._sweep.plan, 0, 0
        alive = len(self._sweep.points) if p["space"] else 0
        for epoch in self._sweep.rungs:
            total += alive * (epoch - before)
            before, alive = epoch, max(math.ceil(alive * p["keep"]), min(p["finalists"], alive))
        finalists = min(p["finalists"] + 1, p["trials"])
        return total + finalists * p["seeds"] * self._sweep.rungs[-1]

    def show(self, stage: list[Job], at_work: dict[int, Job]) -> None:
        """Shows where the jobs are."""
        if not self._terminal:
            return
        for slot, bar in enumerate(self._bars):
            row = self._last_row(at_work[slot]) if slot in at_work else {}
            name = at_work[slot].run if slot in at_work else "waiting"
            bar.set_description_str(f"{name}  {_figures(row)}", refresh=False)
            bar.n = row.get("epoch", 0)
            bar.refresh()
        done = sum(self._sweep.value(job) is not None for job in stage)
        self._all.set_description_str(f"{done}/{len(stage)}{self._best[1]}", refresh=False)
        self._all.n = self._done + sum(bar.n for bar in self._bars)
        self._all.refresh()

    def ended(self, job: Job) -> None:
        """Says how a job ended."""
        value = self._sweep.value(job)
        if value is None:  # its process was killed
            return
        before = max((rung for rung in self._sweep.rungs if rung < (job.epoch or 0)), default=0)
        self._done += (job.epoch or before) - (before if job.run.startswith("trials") else 0)
        values = ", ".join(f"{k}={v}" for k, v in self._sweep.point(job.run).items())
        if value == FAILED:
            why = json.loads((self._sweep.folder(job.run) / "failed.json").read_bytes())["why"]
            say(f"{job.run}  failed: {why[:100]}  {values}")
            return
        if job.epoch and value > self._best[0]:
            self._best = (value, f"  best {value[0]:.4f} ({job.run})")
        where = "test" if job.epoch is None else f"epoch {job.epoch}"
        left = "" if self._terminal else f"{self._best[1]}  {self._done}/{self._all.total} epochs"
        say(f"{job.run}  {where}  top1 {value[0]:.4f}  loss {-value[1]:.4f}  {values}{left}")

    def _last_row(self, job: Job) -> dict[str, Any]:
        with contextlib.suppress(OSError):
            rows = read_metrics(self._sweep.folder(job.run) / "metrics.jsonl")
            return rows[-1] if rows else {}
        return {}


FORMAT = "  {desc:<40} {bar} {n:.1f}/{total} epochs"


def _figures(row: dict[str, Any]) -> str:
    found = {key: row[key] for key in ("loss", "top1") if row.get(key) is not None}
    return "  ".join(f"{key} {value:.4f}" for key, value in found.items())
