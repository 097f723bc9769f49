"""Tries many values of a config's keys, and says which are best on validation.

    python -m imgcls sweep --config=configs/digits.py --workdir=sweeps/a
        --space=configs/spaces/digits.py [--space="optim.learning_rate=log(0.001, 0.1)" ...]
        [--trials=30] [--rungs=2,5] [--keep=0.5] [--finalists=3] [--seeds=3] [--workers=2]

The same command goes on after a kill, and joins from another terminal or machine that sees the
workdir. Without --config and --space it goes on with what the workdir holds. More --trials extend a
sweep. Trial 0 is the config as it is. --rungs are epochs after which the best --keep of the trials
go on. The --finalists, and trial 0, are trained again with fresh --seeds. Without a space, the
config itself is. The test split stays closed; --test opens it at the end, for the winner alone.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from absl import flags
from ml_collections import ConfigDict, config_flags

import imgcls.train
from imgcls import config as configs
from imgcls.config import KEYS, flatten, to_json, validate
from imgcls.errors import CheckpointError, ImgclsError, Stopped, UserError, out_of_memory
from imgcls.experiment import Experiment
from imgcls.run import cli, files, machine, signals
from imgcls.run.logs import read_metrics, say
from imgcls.run.workdir import read_json, write_json
from imgcls.tuning import space as spaces
from imgcls.tuning import summary
from imgcls.tuning.plan import Job, Sweep
from imgcls.tuning.progress import Progress

POLL_SECONDS = 0.2
DEATHS = 2  # of the processes of one trial, after which it counts as failed
NETWORK = ("nfs", "nfs4", "lustre", "smbfs", "cifs", "fuse.sshfs")
check_flags, more_help = configs.check_flags, configs.describe


def sweep(
    config: ConfigDict,
    space: spaces.Space,
    *,
    workdir: str | Path,
    workers: int = 1,
    **plan: Any,
) -> dict[str, Any]:
    """Runs or goes on with a sweep, in processes of its own, and returns its results.json.

    Args:
        config: of trial 0, which the others vary.
        space: see `imgcls.tuning.space`.
        workdir: of the sweep.
        workers: how many trials run at once.
        **plan: trials=30, rungs=(), keep=0.5, finalists=3, seeds=3, search="halton", seed=0,
            test=False, keep_checkpoints=False: as the flags of `python -m imgcls sweep`.

    Raises:
        UserError, CheckpointError, ImgclsError: as the command would end.
    """
    workdir = Path(workdir)
    start(workdir, config, spaces.canonical(space), workers=workers, **plan)
    command = [sys.executable, "-m", "imgcls", "sweep", f"--workdir={workdir.absolute()}"]
    root = str(Path(imgcls.train.__file__).parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    options["env"] = os.environ | {"PYTHONPATH": path}
    last = ""
    with subprocess.Popen([*command, f"--workers={workers}"], **options) as process:
        for line in process.stdout or ():
            say(last := line.rstrip("\n"))
    if process.returncode:
        kind = {2: UserError, 4: CheckpointError}.get(process.returncode, ImgclsError)
        raise kind(last.removeprefix("error: "))
    return read_json(workdir / "results.json")


def start(
    workdir: Path,
    config: ConfigDict,
    space: spaces.Space,
    *,
    trials: int = 30,
    rungs: tuple[int, ...] = (),
    keep: float = 0.5,
    finalists: int = 3,
    seeds: int = 3,
    search: str = "halton",
    seed: int = 0,
    test: bool = False,
    keep_checkpoints: bool = False,
    workers: int = 1,
) -> None:
    """Writes sweep.json, or checks that the one which is there plans the same."""
    validate(config)
    if not config.data.validation:
        raise UserError("a sweep chooses on validation: set config.data.validation")
    every = config.train.validate_every_epochs
    for rung in rungs:
        if not 0 < rung < config.train.epochs or rung % every:
            raise UserError(
                f"--rungs: {rung} must be a multiple of config.train.validate_every_epochs={every} "
                f"under config.train.epochs={config.train.epochs}"
            )
    if list(rungs) != sorted(set(rungs)):
        raise UserError(f"--rungs={','.join(map(str, rungs))} must rise")
    plan = {"config": to_json(config), "space": space, "rungs": list(rungs), "keep": keep}
    plan |= {"finalists": finalists, "seeds": seeds, "search": search, "seed": seed}
    plan |= {"trials": trials if space else 1}
    points, _ = spaces.halton_points(space, config, trials, seed)
    for point in points:  # before anything is trained
        spaces.config_at(config, point)
    path = workdir / "sweep.json"
    with files.lock(workdir / ".lock", busy=lambda process: None, refused=_refused(workdir)):
        if (workdir / "config.json").exists():
            raise UserError(f"{workdir} holds a run, not a sweep: use another --workdir")
        if path.exists():
            _check_same(read_json(path), plan, workdir)
        # Trials have as many cores at every start, because their number decides the last bits.
        cores = read_json(path)["cores"] if path.exists() else len(machine.cores()) // workers or 1
        plan |= {"cores": cores, "test": test, "keep_checkpoints": keep_checkpoints}
        write_json(path, plan)
    if space and search == "halton" and len(points) < trials:
        say(f"the space has {len(points) - 1} points beside the config itself")


def _refused(workdir: Path) -> Callable[[str], str]:
    return lambda why: f"--workdir={workdir} cannot be used ({why}): name another directory"


def _check_same(saved: dict[str, Any], plan: dict[str, Any], workdir: Path) -> None:
    old, new = flatten(saved), flatten(plan)
    ignored = {"trials", "test", "keep_checkpoints", "cores"}
    ignored |= {f"config.{key}" for key, entry in KEYS.items() if entry.harmless}
    differ = [k for k in {**old, **new} if k not in ignored and old.get(k) != new.get(k)]
    if differ:
        shown = ", ".join(f"{k}={new.get(k)!r} (was {old.get(k)!r})" for k in differ)
        raise UserError(f"{workdir} holds another sweep: {shown}; use another --workdir")
    if new["trials"] < old["trials"]:
        raise UserError(f"{workdir} has {old['trials']} trials: --trials must be at least that")


# Workers


def work(workdir: Path, workers: int) -> dict[str, Any]:
    """Runs `workers` jobs at a time until the sweep has ended, and writes its results.

    Each job is a fork of this process, which has imported everything and started no backend.

    Raises:
        Stopped: on a signal, after every job has saved; the same command goes on.
        CheckpointError, UserError, ImgclsError: a job ended by what is not its own fault.
    """
    sweep, slots = Sweep(workdir), dict[int, _Child]()
    _warn_of_network(workdir)
    with signals.StopSignal() as stop, contextlib.ExitStack() as stack:
        stack.callback(lambda: _stop(slots.values(), stop))
        _wait(_Child(lambda: _prepare(sweep.config), workdir / "log.txt"), stop)
        progress = stack.enter_context(Progress(sweep, workers))
        while True:
            stage, missing = sweep.next({child.job.run for child in slots.values()})
            if not stage and not slots:
                break
            for slot in range(workers):
                if slot in slots and slots[slot].poll():
                    child = slots.pop(slot)
                    child.finish(sweep)
                    progress.ended(child.job)
                elif slot not in slots and (child := _claim(sweep, missing, slot)):
                    slots[slot] = child
                    missing.remove(child.job)
            progress.show(stage, {slot: child.job for slot, child in slots.items()})
            if stop.requested:
                raise stop.stopped("every trial is saved; the same command goes on")
            time.sleep(POLL_SECONDS)
    if not sweep.plan["keep_checkpoints"]:
        _tidy(sweep)
    return summary.write(sweep)


class _Child:
    """A fork of this process that runs a function; its output goes to a file."""

    def __init__(
        self,
        function: Callable[[], None],
        log: Path,
        *,
        job: Job | None = None,
        cores: list[int] | None = None,
        claim: contextlib.ExitStack | None = None,
    ):
        self.job, self.log, self._claim, self.code = job, log, claim, None
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            os._exit(_in_child(function, log, cores))

    def poll(self) -> bool:
        """Whether it has ended."""
        if self.code is None and (ended := os.waitpid(self._pid, os.WNOHANG))[0]:
            self.code = os.waitstatus_to_exitcode(ended[1])
            if self._claim:
                self._claim.close()
        return self.code is not None

    def send(self, number: int) -> None:
        if self.code is None:
            os.kill(self._pid, number)

    def finish(self, sweep: Sweep | None = None) -> None:
        """Raises what ended the process, unless that is a stop or the job's own fault."""
        if self.code in (0, *signals.EXIT_CODES.values()):
            return
        if sweep and self.job and self.code < 0:
            folder = sweep.folder(self.job.run)
            files.append_line(folder / "deaths.jsonl", json.dumps({"signal": -self.code}))
            if len(read_metrics(folder / "deaths.jsonl")) >= DEATHS:
                why = f"signal {-self.code} ended it {DEATHS} times (out of memory?)"
                write_json(folder / "failed.json", {"exit_code": self.code, "why": why})
            return
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() or ["killed"]
        kind = {2: UserError, 4: CheckpointError}.get(self.code, ImgclsError)
        raise kind(f"{lines[-1].removeprefix('error: ')} (see {self.log})")


def _in_child(function: Callable[[], None], log: Path, cores: list[int] | None) -> int:
    code = 1
    try:
        signal.set_wakeup_fd(-1)  # the parent's
        for number in signals.EXIT_CODES:
            signal.signal(number, signal.SIG_DFL)
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)  # the threads of XLA and of oneDNN are as many
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        function()
        code = 0
    except ImgclsError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _prepare(config: ConfigDict) -> None:
    """Decodes the data for all trials; what is wrong with them is no trial's fault."""
    exp = Experiment(config, test=False)
    say(f"{len(exp.splits['train'])} training examples, {exp.total_steps} steps in trial 0")


def _run(sweep: Sweep, job: Job) -> None:
    """Trains a run up to an epoch, or evaluates it. Its own fault is written down, not raised."""
    folder, first = sweep.folder(job.run), not sweep.point(job.run)
    try:
        imgcls.train.train_and_evaluate(
            sweep.config_of(job.run), folder, until_epoch=job.epoch, test=job.epoch is None
        )
    except (Stopped, CheckpointError):
        raise
    except Exception as error:
        known = error if isinstance(error, ImgclsError) else out_of_memory(error)
        if known is None or (first and known.exit_code == UserError.exit_code):
            raise known or error from error
        print(f"error: {known}", file=sys.stderr)
        write_json(folder / "failed.json", {"exit_code": known.exit_code, "why": str(known)})


def _claim(sweep: Sweep, jobs: list[Job], slot: int) -> _Child | None:
    """Starts the first of the jobs that no other process is at, if there is one."""
    for job in jobs:
        claim = contextlib.ExitStack()
        lock = sweep.workdir / "locks" / job.run.replace("/", "-")
        try:
            claim.enter_context(files.lock(lock, busy=_busy, refused=_refused(sweep.workdir)))
        except _Busy:
            continue
        if sweep.value(job) is None:
            folder = sweep.folder(job.run)
            folder.mkdir(parents=True, exist_ok=True)
            cores, share = machine.cores(), sweep.plan["cores"]
            mine = [cores[(slot * share + i) % len(cores)] for i in range(share)]
            log = folder / "log.txt"
            return _Child(partial(_run, sweep, job), log, job=job, cores=mine, claim=claim)
        claim.close()
    return None


class _Busy(Exception):
    """Another process has a job."""


def _busy(process: str) -> None:
    raise _Busy


def _wait(child: _Child, stop: signals.StopSignal) -> None:
    while not child.poll():
        if stop.requested:
            child.send(stop.requested)
        time.sleep(POLL_SECONDS)
    child.finish()


def _stop(children: Any, stop: signals.StopSignal) -> None:
    """Asks the children to save and leave, and waits for them."""
    for child in children:
        child.send(stop.requested or signal.SIGTERM)
    while not all([child.poll() for child in children]):
        time.sleep(POLL_SECONDS)


def _tidy(sweep: Sweep) -> None:
    """Deletes the checkpoints of the trials that are out."""
    for folder in (sweep.workdir / "trials").glob("*/checkpoints"):
        if f"trials/{folder.parent.name}" not in sweep.alive:
            shutil.rmtree(folder, ignore_errors=True)


def _warn_of_network(workdir: Path) -> None:
    mounts = {p.mountpoint: p.fstype for p in psutil.disk_partitions(all=True)}
    for folder in (workdir.absolute(), *workdir.absolute().parents):
        if kind := mounts.get(str(folder)):
            if kind in NETWORK:
                told = "%s is on %s, where locks may not hold between machines: use one at a time"
                logging.warning(told, workdir, kind)
            return


# The command


def define_flags() -> None:
    config_flags.DEFINE_config_file(
        "config", None, "File with get_config(), as for training.", lock_config=True
    )
    flags.DEFINE_multi_string("space", [], "File with get_space(), or KEY=VALUES; may be repeated.")
    flags.DEFINE_integer("trials", 30, "How many points, with the config itself.", 1)
    flags.DEFINE_list("rungs", [], "Epochs after which only the best go on, such as 2,5.")
    flags.DEFINE_float("keep", 0.5, "Share of the trials that goes on after each.", 0, 1)
    flags.DEFINE_integer("finalists", 3, "How many are trained again with fresh seeds.", 1)
    flags.DEFINE_integer("seeds", 3, "How often.", 1)
    flags.DEFINE_integer("workers", 1, "Trials that run at once on this machine.", 1)
    flags.DEFINE_enum(
        "search", "halton", ["halton", "tpe"], "tpe (needs optuna) learns on the way."
    )
    flags.DEFINE_integer("seed", 0, "Of the points.", 0)
    flags.DEFINE_boolean("test", False, "Open the test split at the end, for the winner alone.")
    flags.DEFINE_boolean("keep_checkpoints", False, "Those of trials that are out, too.")


def main(_: list[str]) -> None:
    f, workdir = flags.FLAGS, cli.required_workdir()
    if f.config is None and not (workdir / "sweep.json").exists():
        raise UserError("--config is missing: try --config=configs/digits.py")
    if f.config is not None:
        try:
            rungs = tuple(map(int, f.rungs))
        except ValueError:
            raise UserError(f"--rungs={','.join(f.rungs)} must be epochs, such as 2,5") from None
        names = ("trials", "keep", "finalists", "seeds", "search", "seed", "test")
        given = {name: f[name].value for name in (*names, "keep_checkpoints")}
        config = f.config.copy_and_resolve_references()
        start(workdir, config, spaces.read_space(f.space), rungs=rungs, workers=f.workers, **given)
    results = work(workdir, f.workers)
    say("\n".join(results["findings"]))
    say(f"\n{workdir / 'sweep.html'}")
