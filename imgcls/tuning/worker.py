"""The processes of a sweep: each is a fork of this one and takes a job that no other has.

A fork has everything imported, which saves seconds per trial. The parent must start no backend.
"""

import contextlib
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import imgcls.train
from imgcls.errors import CheckpointError, ImgclsError, Stopped, UserError, out_of_memory
from imgcls.run import files, machine, signals
from imgcls.run.logs import complain, read_lines
from imgcls.run.workdir import write_json
from imgcls.tuning.plan import Job, Sweep

POLL_SECONDS = 0.2
DEATHS = 2  # of the processes of one trial, after which it counts as failed


class Child:
    """A fork of this process that runs a function; its output is appended to a file."""

    def __init__(self, function: Callable[[], None], log: Path, cores: Sequence[int] = ()):
        self.code, self._log = 0, log
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings(action="ignore"):  # the other thread only waits for signals
            self._pid = os.fork()
        if self._pid == 0:
            _be_child(function, log, cores)

    def poll(self) -> bool:
        """Whether it has ended. Then `code` is its exit code, or minus the signal that ended it."""
        if self._pid and (ended := os.waitpid(self._pid, os.WNOHANG))[0]:
            self._pid, self.code = 0, os.waitstatus_to_exitcode(ended[1])
        return not self._pid

    def send(self, number: int) -> None:
        if not self.poll():
            os.kill(self._pid, number)

    def check(self) -> None:
        """Raises the error that ended it, but for signals."""
        if self.code <= 0 or self.code in signals.EXIT_CODES.values():
            return
        text = self._log.read_text(encoding="utf-8", errors="replace").strip() or "no output"
        raise as_error(self.code, f"{text.splitlines()[-1]} (see {self._log})")


def as_error(code: int, line: str) -> ImgclsError:
    """The error behind the exit code and the last line of a process."""
    kinds = {kind.exit_code: kind for kind in ImgclsError.__subclasses__() if kind.exit_code > 1}
    return kinds.get(code, ImgclsError)(line.removeprefix("error: "))


class AtWork(NamedTuple):
    job: Job
    child: Child
    claim: contextlib.ExitStack  # the lock; the child holds it, too


def _be_child(function: Callable[[], None], log: Path, cores: Sequence[int]) -> None:
    code = 1
    try:
        signal.set_wakeup_fd(-1)  # the parent's
        for number in signals.EXIT_CODES:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        if machine.accelerators():  # several trials may share one
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        elif cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)  # the threads of XLA and of oneDNN are as many
        with open(log, "a", encoding="utf-8", buffering=1) as file:
            sys.stdout = sys.stderr = file
            for stream in (1, 2):  # of what is not Python
                os.dup2(file.fileno(), stream)
            code = _exit_code(function)
    finally:
        os._exit(code)


def _exit_code(function: Callable[[], None]) -> int:
    try:
        function()
    except ImgclsError as error:
        complain(f"error: {error}")
        return error.exit_code
    except BaseException:
        complain(traceback.format_exc())
        return 1
    return 0


def claim(sweep: Sweep, jobs: list[Job], slot: int) -> dict[int, AtWork]:
    """Starts the first of the jobs that no other process has, and takes it from the list."""
    for job in jobs:
        lock = sweep.workdir / "locks" / job.run.replace("/", "-")
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(files.lock(lock, busy=_busy, refused=refused(sweep.workdir)))
            except BlockingIOError:
                continue
            if sweep.value(job) is None:
                jobs.remove(job)
                folder = sweep.folder(job.run)
                folder.mkdir(parents=True, exist_ok=True)
                cores, share = machine.cores(), sweep.plan["cores"]
                mine = [cores[(slot * share + i) % len(cores)] for i in range(share)]
                child = Child(partial(_train, sweep, job), folder / "log.txt", mine)
                return {slot: AtWork(job, child, stack.pop_all())}
    return {}


def _busy(process: str) -> None:
    raise BlockingIOError


def refused(workdir: Path) -> Callable[[str], str]:
    return lambda why: f"--workdir={workdir} cannot be used ({why}): name another directory"


def _train(sweep: Sweep, job: Job) -> None:
    """Trains a run up to an epoch, or evaluates it. Its own fault is written down, not raised.

    What is wrong with the config as it is ends the sweep.
    """
    try:
        imgcls.train.train_and_evaluate(
            sweep.config_of(job.run),
            sweep.folder(job.run),
            until_epoch=job.epoch,
            test=job.epoch is None,
        )
    except (Stopped, CheckpointError):
        raise
    except Exception as error:
        known = error if isinstance(error, ImgclsError) else out_of_memory(error)
        if known is None or (isinstance(error, UserError) and not sweep.point(job.run)):
            raise
        complain(f"error: {known}")
        fail(sweep, job, known)


def fail(sweep: Sweep, job: Job, error: ImgclsError) -> None:
    """Writes why a run has no result; raises it if the run was trained, and is to be tested."""
    if job.epoch is None:
        raise error
    why = {"exit_code": error.exit_code, "why": str(error)}
    write_json(sweep.folder(job.run) / "failed.json", why)


def check(sweep: Sweep, ended: AtWork) -> None:
    """Raises what ended a process, unless it was a signal: then the job comes again, or fails.

    Signals that ask a run to stop are no failure of the job.
    """
    ended.child.check()
    code, folder = ended.child.code, sweep.folder(ended.job.run)
    if code == 0 and sweep.value(ended.job) is None:
        told = f"its result is not in {folder}: delete that folder, and run the same command again"
        raise CheckpointError(f"{ended.job.run} has ended, but {told}")
    if code < 0 and -code not in signals.EXIT_CODES:
        deaths = folder / "deaths.jsonl"
        files.append_line(deaths, json.dumps({"signal": -code}))
        if len(read_lines(deaths)) >= DEATHS:
            why = f"its process was ended {DEATHS} times by signal {-code} (out of memory?)"
            fail(sweep, ended.job, ImgclsError(why))


def stop_all(children: Sequence[Child], stop: signals.StopSignal) -> None:
    """Asks processes to save and leave, and waits for them."""
    for child in children:
        child.send(stop.requested or signal.SIGTERM)
    while not all([child.poll() for child in children]):
        time.sleep(POLL_SECONDS)
