"""The plan of a sweep, and what is to be done next."""

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from imgcls.config import from_json, to_json
from imgcls.errors import UserError
from imgcls.run.logs import read_metrics
from imgcls.run.workdir import read_json
from imgcls.tuning import space as spaces

Value = tuple[float, float]  # top-1 and minus the loss: the more the better
FAILED = (-1.0, -math.inf)  # the value of a run without one
PLAN = {"config": dict, "space": dict, "trials": int, "rungs": list, "keep": float}
PLAN |= {"finalists": int, "seeds": int, "search": str, "seed": int, "cores": int}
PLAN |= {"test": bool, "keep_checkpoints": bool}


class Job(NamedTuple):
    """A run, such as "trials/007" or "seeds/007-2", up to an epoch, or on the test split."""

    run: str
    epoch: int | None  # None: test


class Sweep:
    """What is to be done next is a function of sweep.json and of the files that the runs leave."""

    def __init__(self, workdir: Path):
        self.workdir = workdir
        self.plan = read_plan(workdir)
        self.config = from_json(self.plan["config"])
        p, epochs = self.plan, self.config.train.epochs
        self.rungs = [*p["rungs"], epochs]
        self.points, self._cubes = spaces.halton_points(
            p["space"], self.config, p["trials"], p["seed"]
        )
        if p["search"] == "tpe":
            del self.points[spaces.STARTUP :]
        self.alive: list[str] = []  # trials that are not out, as far as is known
        self._values: dict[Job, Value] = {}

    def folder(self, run: str) -> Path:
        return self.workdir / run

    def point(self, run: str) -> dict[str, Any]:
        return self.points[int(run.partition("/")[2].partition("-")[0])]

    def config_of(self, run: str) -> ConfigDict:
        config = spaces.config_at(self.config, self.point(run))
        if seed := run.partition("-")[2]:
            config.seed = int(seed)
        return config

    def value(self, job: Job) -> Value | None:
        """None while there is none yet; FAILED where the run failed."""
        if job not in self._values:
            folder, row = self.folder(job.run), None
            if job.epoch is None:
                results = folder / "results.json"
                row = read_json(results) if results.exists() else None
            for other in [] if job.epoch is None else read_metrics(folder / "metrics.jsonl"):
                if other["split"] == "validation" and other["epoch"] == job.epoch:
                    row = other
            if row is not None:
                loss = math.inf if row.get("loss") is None else row["loss"]  # null: not finite
                self._values[job] = (row.get("top1") or 0.0, -loss)
            elif (folder / "failed.json").exists():
                self._values[job] = FAILED
        return self._values.get(job)

    def stages(self) -> Iterator[list[Job]]:
        """Jobs that may run at once. The next stage is known when all of one have a value."""
        for runs in self._generations():
            yield [Job(run, self.rungs[0]) for run in runs]
        self.alive = [f"trials/{i:03d}" for i in range(len(self.points))]
        for epoch, after in zip(self.rungs, [*self.rungs[1:], None]) if self.plan["space"] else ():
            yield [Job(run, epoch) for run in self.alive]
            keep = 0 if after is None else math.ceil(len(self.alive) * self.plan["keep"])
            ranked = self.ranked(self.alive, epoch)[: max(keep, self.plan["finalists"])]
            best = {*ranked, "trials/000"}  # the config as it is comes to the end
            self.alive = [r for r in self.alive if r in best and self.succeeded(Job(r, epoch))]
        yield [Job(run, self.rungs[-1]) for trial in self.alive for run in self.seeded(trial)]
        if self.plan["test"] and (best := self.finalists())[:1]:
            yield [Job(run, None) for run in self.seeded(best[0]) if self.mean(best[0]) != FAILED]

    def _generations(self) -> Iterator[list[str]]:
        """The trials whose points are known, then those that follow from their values."""
        done = 0
        while self.plan["space"] and done < len(self.points):
            runs = [f"trials/{i:03d}" for i in range(len(self.points))]
            yield runs[done:]
            done = len(runs)
            if self.plan["search"] == "tpe":
                values = [self.value(Job(run, self.rungs[0])) for run in runs]
                earlier = [(c, max(v[0], 0.0)) for c, v in zip(self._cubes, values) if c and v]
                for i in range(done, min(done + spaces.GENERATION, self.plan["trials"])):
                    cube = spaces.tpe_cube(self.plan["space"], earlier, self.plan["seed"] + i)
                    self._cubes[i:] = [cube]
                    self.points.append(spaces.point(self.plan["space"], cube))

    @property
    def seeds(self) -> list[int]:
        """Not the one that chose the finalists, unless nothing was chosen."""
        first = self.config.seed + bool(self.plan["space"])
        return list(range(first, first + self.plan["seeds"]))

    def seeded(self, trial: str) -> list[str]:
        """The runs of a trial with fresh seeds."""
        return [f"{trial.replace('trials', 'seeds')}-{seed}" for seed in self.seeds]

    def finalists(self) -> list[str]:
        """The trials that were trained with fresh seeds, the best mean first."""
        return sorted(self.alive, key=self.mean, reverse=True)

    def mean(self, trial: str) -> Value:
        """The mean value over fresh seeds; FAILED if one failed."""
        values = [self.value(Job(run, self.rungs[-1])) or FAILED for run in self.seeded(trial)]
        top1, loss = zip(*values)
        return FAILED if FAILED in values else (fmean(top1), fmean(loss))

    def ranked(self, runs: list[str], epoch: int) -> list[str]:
        """The best first; of equals, the first."""
        return sorted(runs, key=lambda run: self.value(Job(run, epoch)) or FAILED, reverse=True)

    def succeeded(self, job: Job) -> bool:
        return (self.value(job) or FAILED) != FAILED

    def next(self, at_work: set[str]) -> tuple[list[Job], list[Job]]:
        """The present stage, and its jobs that are to do and not `at_work`; ([], []) at the end."""
        for stage in self.stages():
            if missing := [job for job in stage if self.value(job) is None]:
                return stage, [job for job in missing if job.run not in at_work]
        return [], []


def read_plan(workdir: Path) -> dict[str, Any]:
    """sweep.json. Raises UserError where it is missing or broken."""
    path = workdir / "sweep.json"
    plan = read_json(path)
    if {key: type(value) for key, value in plan.items()} != PLAN:
        raise UserError(f"{path} is no plan of a sweep: restore it, or use another --workdir")
    return plan | {"config": to_json(from_json(plan["config"]))}  # an older one lacks keys
