"""Several processes of one run, such as one a machine: how they meet, agree to stop, and leave.

Each holds a part of the devices and reads its rows of every batch. Process 0 alone claims the
workdir, prints, and writes anything but checkpoints, in which all take part.
"""

import contextlib
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imgcls.errors import ImgclsError, PeerError, Stopped, UserError, first_line
from imgcls.parallel import is_main, make_mesh, of_all_processes, put_batch, replicated
from imgcls.run.logs import say
from imgcls.run.signals import StopSignal, in_thread

PATIENCE = 10  # seconds that a process which stops or fails waits for the others to leave too


@contextlib.contextmanager
def session(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    start_timeout: int,
    heartbeat_timeout: int,
) -> Iterator[None]:
    """Joins the other processes, if any, before JAX computes, and leaves together with them.

    Args:
        coordinator_address: "host:port" of process 0, reachable from all. Where all three are None,
            JAX detects them (Slurm, Open MPI, Cloud TPU, Kubernetes), else this is the only one.
        num_processes: how many there are; 1 turns the detection off.
        process_id: which one this is, from 0.
        start_timeout: seconds to wait until all are there.
        heartbeat_timeout: seconds after which a silent process is dead, and JAX aborts the others.

    Raises:
        UserError: the three do not fit together, or not all processes came in time.
        PeerError: another process died, as seen by a collective operation of this one.
    """
    names = ("coordinator_address", "num_processes", "process_id")
    given: dict[str, Any] = dict(zip(names, (coordinator_address, num_processes, process_id)))
    met = f"met at --coordinator_address={coordinator_address}"
    if set(given.values()) == {None}:
        if several := _detected():
            met = f"({several}) met"
            say(f"{several}: waiting up to {start_timeout} s; --num_processes=1 trains alone")
    elif several := num_processes != 1:
        _check(**given)
    if not several:
        yield
        return
    # JAX would take SIGTERM for itself; a stop is agreed upon by `Agreement`.
    with contextlib.suppress(AttributeError):  # which jax 0.7 has not
        jax.config.update("jax_enable_preemption_service", False)
    given["heartbeat_timeout_seconds"] = heartbeat_timeout
    # JAX aborts the process at its own timeout; ours comes first, and tells what to do.
    given["initialization_timeout"] = start_timeout + 60
    try:
        joined = _in_time(partial(jax.distributed.initialize, **given), start_timeout)
    except Exception as error:
        raise UserError(f"this process cannot join the others: {first_line(error)}") from error
    if not joined:
        raise UserError(
            f"not all processes of this run {met} within {start_timeout} s: start every one with "
            "the same command but its own --process_id, raise --start_timeout, or train alone with "
            "--num_processes=1"
        )
    if not is_main():
        logging.getLogger().setLevel(logging.ERROR)
    try:
        yield
        jax.distributed.shutdown()  # when all are here: process 0 may still write the report
    except ImgclsError:
        # The others often fail or stop likewise, and process 0 must not leave before them.
        with contextlib.suppress(Exception):
            _in_time(jax.distributed.shutdown, PATIENCE)
        raise
    except jax.errors.JaxRuntimeError as error:
        if not re.search("gloo|nccl|connection|unavailable|heartbeat", str(error), re.IGNORECASE):
            raise
        gone = f"another process of this run is gone ({first_line(error)}): see what it said"
        raise PeerError(f"{gone}, and start all of them again to resume") from error


class Agreement:
    """Whether any process was asked to stop: the same answer in all of them, at the same call.

    The devices answer `delay` calls later, so that no step waits. A process alone answers at once.
    """

    def __init__(self, stop: StopSignal, *, delay: int):
        self._stop, self._delay, self._mesh = stop, delay, make_mesh()
        self._max = jax.jit(jnp.max, out_shardings=replicated(self._mesh))
        self._asked: list[jax.Array] = []
        self._signal = 0

    def __call__(self) -> bool:
        if jax.process_count() == 1:
            return bool(self._stop.requested)
        if not self._signal:
            signal = lambda rows: {"signal": np.full(len(rows), self._stop.requested)}
            batch = put_batch(signal, np.arange(jax.device_count()), self._mesh)
            self._asked.append(self._max(batch["signal"]))
            if len(self._asked) > self._delay:
                self._signal = int(self._asked.pop(0))
        return self._signal != 0

    def stopped(self, text: str) -> Stopped:
        """What to raise once all have agreed and saved."""
        self._stop.requested = self._stop.requested or self._signal
        return self._stop.stopped(text)


def check_same(facts: Callable[[], dict[str, Any]]) -> None:
    """Raises UserError in all processes of this run where `facts()` differ; all must call it."""
    if not jax.distributed.is_initialized():
        return
    first, *others = of_all_processes(facts())
    differing = [
        f"{key} is {first.get(key)} in process 0, {other.get(key)} in process {i}"
        for i, other in enumerate(others, 1)
        for key in first | other
        if first.get(key) != other.get(key)
    ]
    if differing:
        shown = "; ".join(differing[:5])
        raise UserError(f"the processes of this run differ: {shown}. Start all of them alike")


def _check(**given: Any) -> None:
    for name, value in given.items():
        if value is None:
            others = " and ".join(f"--{n}" for n in given if n != name)
            raise UserError(f"--{name} is missing: it goes together with {others}")
    address, count, index = given.values()
    if not re.fullmatch(r"[^:\s]+:\d+|\[[^\s]+\]:\d+", address):
        raise UserError(f"--coordinator_address={address} must be host:port of process 0")
    if not 0 <= index < count:
        raise UserError(f"--process_id={index} must be at least 0, below --num_processes={count}")
    if index == 0:
        try:  # JAX would crash
            socket.create_server(("", int(address.rpartition(":")[2]))).close()
        except (OSError, OverflowError) as error:
            raise UserError(
                f"--coordinator_address={address}: the port cannot be opened here ({error}): "
                "choose another in all processes"
            ) from None


def _detected() -> str:
    """How many processes of this command run, where JAX knows this cluster; "" if it is one."""
    try:
        from jax._src.clusters import ClusterEnv  # no public name tells without starting

        for cluster in ClusterEnv._cluster_types:
            # Most pods belong to no job of several; JAX would look for its package and warn.
            pod = cluster.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ
            if not cluster.opt_in_only_method and not pod and cluster.is_env_present():
                count = cluster.get_process_count()
                return f"{cluster.__name__} has {count} processes of this run" if count > 1 else ""
    except Exception as error:
        logging.warning(
            "this may be one of several processes, but JAX cannot tell (%s): if so, give each "
            "--coordinator_address, --num_processes and --process_id; else --num_processes=1",
            first_line(error),
        )
    return ""


def _in_time(function: Callable[[], None], seconds: float) -> bool:
    """Runs function() in a thread; False when it takes longer: it is then left behind."""
    future = in_thread(function)
    return bool(wait([future], seconds).done) and future.result() is None
