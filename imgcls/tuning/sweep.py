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
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from absl import flags
from ml_collections import ConfigDict, config_flags

import imgcls.train
from imgcls import arguments
from imgcls.config import completed, flatten, from_json, left_open, to_json, validate
from imgcls.data.opening import resolve
from imgcls.errors import CheckpointError, UserError
from imgcls.experiment import Experiment
from imgcls.keys import KEYS
from imgcls.run import cli, files, signals
from imgcls.run.logs import say
from imgcls.run.workdir import read_json, write_json
from imgcls.tuning import space as spaces
from imgcls.tuning import summary, worker
from imgcls.tuning.page import write_page
from imgcls.tuning.plan import PLAN, Sweep, read_plan
from imgcls.tuning.progress import Progress

NETWORK = ("nfs", "nfs4", "lustre", "smbfs", "cifs", "fuse.sshfs")
check_flags, more_help = arguments.check_flags, arguments.describe


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
            cores=1, test=False, keep_checkpoints=False: as the flags of `python -m imgcls sweep`.

    Raises:
        UserError, CheckpointError, ImgclsError: as the command would end.
    """
    workdir = Path(os.path.expanduser(workdir))
    start(workdir, config, spaces.canonical(space), **plan)
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
        raise worker.as_error(process.returncode, last)
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
    cores: int = 1,
) -> None:
    """Writes sweep.json, or checks that the one which is there plans the same."""
    validate(config)
    path = workdir / "sweep.json"
    if path.exists():
        config = completed(config, flatten(from_json(read_plan(workdir)["config"])))
    if any(key.startswith("train.") for key in left_open(config)):  # trials decide the rest
        found = flatten(resolve(config)[0])
        config = completed(config, {k: v for k, v in found.items() if k.startswith("train.")})
    every, epochs = config.train.validate_every_epochs, config.train.epochs
    rising = list(rungs) == sorted({r for r in rungs if 0 < r < epochs and r % every == 0})
    counts = {"trials": trials, "finalists": finalists, "seeds": seeds, "cores": cores}
    wrong = {f"--{name}={n} must be at least 1": n < 1 for name, n in counts.items()} | {
        f"--rungs={','.join(map(str, rungs))} must rise, in multiples of config.train."
        f"validate_every_epochs={every} under config.train.epochs={epochs}": not rising,
        f"--keep={keep} must be from 0 to 1": not 0 <= keep <= 1,
        f"--search={search} must be halton or tpe": search not in ("halton", "tpe"),
        "--search=tpe needs optuna: pip install -r requirements-optuna.txt": (
            search == "tpe" and importlib.util.find_spec("optuna") is None
        ),
        f"config.seed={config.seed} must be lower, for --seeds={seeds}": (
            config.seed + seeds >= 2**63
        ),
        "config.train.patience must be 0 in a sweep": config.train.patience,
        "a sweep chooses on validation: set config.data.validation": not config.data.validation,
    }
    for why, is_wrong in wrong.items():
        if is_wrong:
            raise UserError(why)
    plan = {"config": to_json(config), "space": space, "rungs": list(rungs), "keep": float(keep)}
    plan |= {"finalists": finalists, "seeds": seeds, "search": search, "seed": seed}
    plan |= {"trials": trials if space else 1, "cores": cores}  # which decides the last bits
    points, _ = spaces.halton_points(space, config, trials, seed)
    for point in points:  # before anything is trained
        spaces.config_at(config, point)
    with files.lock(workdir / ".lock", busy=lambda process: None, refused=worker.refused(workdir)):
        if (workdir / "config.json").exists():
            raise UserError(f"{workdir} holds a run, not a sweep: use another --workdir")
        if path.exists():
            _check_same(read_plan(workdir), plan, workdir)
        write_json(path, plan | {"test": test, "keep_checkpoints": keep_checkpoints})
    if space and search == "halton" and len(points) < trials:
        say(f"the space has {len(points) - 1} points beside the config itself")


def _check_same(saved: dict[str, Any], plan: dict[str, Any], workdir: Path) -> None:
    old, new = flatten(saved), flatten(plan)
    ignored = {"trials", "test", "keep_checkpoints"}
    ignored |= {f"config.{key}" for key, entry in KEYS.items() if entry.harmless}
    differ = [k for k in {**old, **new} if k not in ignored and old.get(k) != new.get(k)]
    if differ:
        shown = ", ".join(f"{k}={new.get(k)!r} (was {old.get(k)!r})" for k in differ)
        raise UserError(f"{workdir} holds another sweep: {shown}; use another --workdir")
    if new["trials"] < old["trials"]:
        raise UserError(f"{workdir} has {old['trials']} trials: --trials must be at least that")


def work(workdir: Path, workers: int) -> dict[str, Any]:
    """Runs `workers` jobs at a time until the sweep has ended, and writes its results.

    Raises:
        Stopped: on a signal, after every job has saved; the same command goes on.
        CheckpointError, UserError, ImgclsError: a job ended by what is not its own fault.
    """
    sweep, at_work = Sweep(workdir), dict[int, worker.AtWork]()
    _warn_of_network(workdir)
    with signals.StopSignal() as stop, contextlib.ExitStack() as stack:
        data = worker.Child(partial(_prepare, sweep), workdir / "log.txt")
        stack.callback(lambda: worker.stop_all([data, *(b.child for b in at_work.values())], stop))
        while not data.poll():
            if stop.requested:
                raise stop.stopped("every trial is saved; the same command goes on")
            time.sleep(worker.POLL_SECONDS)
        data.check()
        progress = stack.enter_context(Progress(sweep, workers))
        while True:
            stage, missing = sweep.next({busy.job.run for busy in at_work.values()})
            if not stage and not at_work:
                break
            for slot in range(workers):
                if slot not in at_work:
                    at_work |= worker.claim(sweep, missing, slot)
                elif at_work[slot].child.poll():
                    ended = at_work.pop(slot)
                    ended.claim.close()
                    worker.check(sweep, ended)
                    progress.ended(ended.job)
            progress.show(stage, {slot: busy.job for slot, busy in at_work.items()})
            if stop.requested:
                raise stop.stopped("every trial is saved; the same command goes on")
            time.sleep(worker.POLL_SECONDS)
        if not sweep.plan["keep_checkpoints"]:
            _tidy(sweep)
        results = summary.write(sweep)
        write_page(workdir, results)
        return results


def _prepare(sweep: Sweep) -> None:
    """Decodes the data for all trials; what is wrong with them is no trial's fault."""
    exp = Experiment(sweep.config, test=False)
    rates = {"optim.learning_rate", "optim.backbone_ratio"} & sweep.plan["space"].keys()
    if exp.frozen_steps == exp.total_steps and rates == {"optim.learning_rate"}:
        why = "optim.learning_rate has no effect, because the last layer learns alone"
        raise UserError(f"--space: {why}: in another --workdir, vary optim.probe_learning_rate")
    say(f"{len(exp.splits['train'])} training examples, {exp.total_steps} steps in trial 0")


def _tidy(sweep: Sweep) -> None:
    """Deletes the checkpoints of the trials that are out."""
    for folder in (sweep.workdir / "trials").glob("*/checkpoints"):
        if f"trials/{folder.parent.name}" not in sweep.alive:
            shutil.rmtree(folder, ignore_errors=True)


def _warn_of_network(workdir: Path) -> None:
    mounts = {p.mountpoint: p.fstype for p in psutil.disk_partitions(all=True)}
    folders = (workdir.absolute(), *workdir.absolute().parents)
    kind = next((mounts[str(folder)] for folder in folders if str(folder) in mounts), "")
    if kind in NETWORK:
        told = "%s is on %s, where locks may not hold between machines: use one at a time"
        logging.warning(told, workdir, kind)


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
    flags.DEFINE_integer("cores", 1, "Of this machine, for each trial.", 1)
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
        raise UserError(cli.MISSING)
    saved = read_plan(workdir) if f.config is None else {}  # what is not given is as it was
    config = from_json(saved["config"]) if saved else f.config.copy_and_resolve_references()
    given = [name for name in PLAN.keys() - {"config"} if not saved or f[name].present]
    plan = saved | {name: f[name].value for name in given} | {"config": config}
    if "space" in given:
        plan["space"] = spaces.read_space(f.space)
    try:
        plan["rungs"] = tuple(map(int, plan["rungs"]))
    except ValueError:
        raise UserError(f"--rungs={','.join(f.rungs)} must be epochs, such as 2,5") from None
    start(workdir, **plan)
    try:
        results = work(workdir, f.workers)
    except OSError as error:  # of the sweep's own files; a trial's are its process's
        raise CheckpointError(
            f"{workdir} cannot be written ({error.strerror}): free some space and run the same "
            "command again"
        ) from error
    say("\n".join(results["findings"]))
    say(f"\n{workdir / 'sweep.html'}")
