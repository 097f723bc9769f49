"""Several processes of one run, as real processes that talk over gloo on this machine."""

import json
import os
import re
import signal
import socket
import time

import jax
import numpy as np
import pytest

from imgcls import parallel
from imgcls.errors import UserError
from imgcls.run.processes import check_same, session
from tests.commands import Command
from tests.helpers import flags_of, small_config
from tests.test_faults import final_arrays, read_until
from tests.test_train import EVERYTHING

HEARTBEAT = 5  # seconds
LONGER = EVERYTHING | {"train__epochs": 10}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(workdir, config, *arguments, devices=1, environment=()) -> Command:
    command = ["main.py", "--config=configs/digits.py", f"--workdir={workdir}"]
    command += [f"--heartbeat_timeout={HEARTBEAT}", *arguments]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags} | dict(environment)
    return Command(*command, *flags_of(config), env=environment)


def start_pair(workdir, config) -> list[Command]:
    common = [f"--coordinator_address=localhost:{free_port()}", "--num_processes=2"]
    return [start(workdir, config, *common, f"--process_id={i}") for i in range(2)]


def wait_for(*processes) -> tuple[list[int], list[str]]:
    """The exit codes, and what each printed since it was last read."""
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], printed


def finish(*processes) -> list[str]:
    codes, printed = wait_for(*processes)
    assert not any(codes), printed
    return printed


@pytest.mark.slow
def test_two_processes_give_the_result_of_one_with_two_devices(tmp_path):
    config = small_config(augment__rotate_degrees=0.0, augment__zoom_fraction=0.0)  # compile faster
    finish(start(tmp_path / "one", config, devices=2))
    first, second = finish(*start_pair(tmp_path / "two", config))
    # To the last bit: with two devices there is only one order in which to add.
    assert final_arrays(tmp_path / "two") == final_arrays(tmp_path / "one")
    assert "test top1 " in first
    assert all(line.startswith("[Gloo]") for line in second.splitlines())
    names = [{path.name.split(".")[0] for path in (tmp_path / n).iterdir()} for n in ("one", "two")]
    assert names[0] == names[1]


def test_a_peer_that_never_comes(tmp_path):
    arguments = ["--num_processes=2", "--process_id=0", "--start_timeout=1"]
    address = f"localhost:{free_port()}"
    (code,), (printed,) = wait_for(
        start(tmp_path, small_config(), f"--coordinator_address={address}", *arguments)
    )
    assert code == 2
    expected = f"error: not all processes of this run met at --coordinator_address={address} "
    assert printed.splitlines()[-1].startswith(expected)
    assert "Traceback" not in printed and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "address, count, index, named",
    [
        ("localhost:1", 2, None, "--process_id is missing"),
        ("localhost:1", None, 0, "--num_processes is missing"),
        (None, 2, 0, "--coordinator_address is missing"),
        ("localhost", 2, 0, "--coordinator_address=localhost must be host:port"),
        ("localhost:1", 0, 0, "--num_processes=0"),
        ("localhost:1", 2, 2, "--process_id=2"),
        ("localhost:1", 2, -1, "--process_id=-1"),
    ],
)
def test_flags_that_do_not_fit_together(address, count, index, named):
    with pytest.raises(UserError, match=named):
        session(address, count, index, start_timeout=1, heartbeat_timeout=1).__enter__()


def test_a_port_in_use_is_refused():
    with socket.create_server(("", 0)) as listener:
        address = f"localhost:{listener.getsockname()[1]}"
        with pytest.raises(UserError, match=f"--coordinator_address={address}: the port"):
            session(address, 2, 0, start_timeout=1, heartbeat_timeout=1).__enter__()


@pytest.mark.parametrize("environment", [{}, {"SLURM_NTASKS": "1"}, {"SLURM_STEP_NODELIST": "a"}])
def test_one_process_needs_no_flags_and_no_cluster(monkeypatch, environment):
    slurm = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    slurm |= {"SLURM_STEP_NODELIST": "localhost"} if "SLURM_NTASKS" in environment else {}
    for name, value in (slurm | environment).items():
        monkeypatch.setenv(name, value)
    with session(None, None, None, start_timeout=1, heartbeat_timeout=1):
        assert not jax.distributed.is_initialized()


def test_processes_that_differ_are_told_what_differs(monkeypatch):
    theirs = {"config.optim.learning_rate": 0.5, "config.model.widths": [8], "versions.jax": "1"}
    ours = {"config.optim.learning_rate": 0.1, "config.model.widths": (8,), "versions.jax": "1"}

    def gather(x):
        if np.ndim(x) == 0:
            return np.stack([x, 300])
        return np.stack([x, np.frombuffer(json.dumps(theirs).encode().ljust(300), np.uint8)])

    check_same(lambda: pytest.fail("a process alone compares nothing"))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(parallel, "process_allgather", gather)
    expected = r"differ: config.optim.learning_rate is 0.1 in process 0, 0.5 in process 1\."
    with pytest.raises(UserError, match=expected):
        check_same(lambda: ours)
    theirs |= {"config.optim.learning_rate": 0.1}
    check_same(lambda: ours)
    with pytest.raises(UserError, match="the test split is a in process 0, None in process 1"):
        check_same(lambda: ours | {"the test split": "a"})


@pytest.mark.slow
def test_two_processes_with_different_configs_both_refuse(tmp_path):
    common = [f"--coordinator_address=localhost:{free_port()}", "--num_processes=2"]
    configs = (small_config(optim__learning_rate=rate) for rate in (0.1, 0.5))
    pair = [start(tmp_path, c, *common, f"--process_id={i}") for i, c in enumerate(configs)]
    codes, printed = wait_for(*pair)
    assert codes == [2, 2]
    for text in printed:
        assert "learning_rate is 0.1 in process 0, 0.5 in process 1" in text.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_command_by_hand_in_an_allocation_is_told_at_once_how_to_train_alone(monkeypatch, capsys):
    slurm = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")
    for name, value in zip(slurm, ("1", "localhost", "4", "0", "0")):
        monkeypatch.setenv(f"SLURM_{name}", value)

    def others_do_not_come(**_):
        assert "4 processes" in (printed := capsys.readouterr().out)
        assert "waiting up to 1 s; --num_processes=1 trains alone" in printed
        time.sleep(2)

    monkeypatch.setattr(jax.distributed, "initialize", others_do_not_come)
    alone = session(None, None, None, start_timeout=1, heartbeat_timeout=1)
    with pytest.raises(UserError, match=r"4 processes.*within 1 s.*--num_processes=1"), alone:
        raise AssertionError


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pair")
    finish(*start_pair(workdir, small_config(**LONGER)))
    return final_arrays(workdir)


@pytest.mark.slow
def test_with_everything_on_too(undisturbed, tmp_path):
    finish(start(tmp_path, small_config(**LONGER), devices=2))
    assert final_arrays(tmp_path) == undisturbed


def stop(pair, sent, told, code):
    """Signals some of a pair that runs; both must say the step that they stopped at: its number."""
    for i in told:
        pair[i].send_signal(sent)
    codes, printed = wait_for(*pair)
    assert codes == [code, code], printed
    (last,) = {text.splitlines()[-1] for text in printed}
    return re.fullmatch(rf"stopped by {sent.name}: step (\d+) is saved; .*", last)[1]


def kill(pair, victim):
    """Kills one of a pair that runs; the other must end, too."""
    pair[victim].kill()
    try:
        assert pair[1 - victim].wait(HEARTBEAT + 10) != 0
    finally:
        wait_for(*pair)


@pytest.mark.slow
def test_whichever_is_stopped_or_killed_they_end_together_and_resume(undisturbed, tmp_path):
    config, resumed = small_config(**LONGER), "training:"
    for step, disturb, *arguments in [
        (6, stop, signal.SIGTERM, [1], 143),
        (15, stop, signal.SIGINT, [0], 130),
        (24, kill, 0),
        (30, stop, signal.SIGTERM, [0, 1], 143),
        (39, kill, 1),
    ]:
        pair = start_pair(tmp_path, config)
        assert resumed in read_until(pair[0], f"step {step} ")
        stopped = disturb(pair, *arguments)
        resumed = f"resumed at step {stopped} of 50" if stopped else "resumed at step"
    first, _ = finish(*start_pair(tmp_path, config))
    assert resumed in first
    assert final_arrays(tmp_path) == undisturbed


@pytest.mark.slow
def test_a_peer_that_falls_silent_ends_the_others(tmp_path):
    pair = start_pair(tmp_path, small_config(**LONGER))
    read_until(pair[0], "step 3 ")
    pair[1].send_signal(signal.SIGSTOP)
    try:
        assert pair[0].wait(HEARTBEAT + 10) != 0
    finally:
        pair[1].kill()
        wait_for(*pair)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_once_for_all(undisturbed, tmp_path):
    config = small_config(**LONGER)
    pair = start_pair(tmp_path, config)
    read_until(pair[0], "step 21 ")
    pair[0].terminate()
    wait_for(*pair)
    checkpoints = tmp_path / "checkpoints"
    latest = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    for path in (checkpoints / str(latest) / "state").rglob("*"):
        if path.is_file():  # which of them are read is orbax's affair
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    first, _ = finish(*start_pair(tmp_path, config))
    assert f"renamed to damaged-{latest}" in first
    assert (checkpoints / f"damaged-{latest}").exists()
    assert final_arrays(tmp_path) == undisturbed


@pytest.mark.slow
def test_the_processes_of_a_slurm_job_find_each_other(tmp_path):
    pair = [
        start(
            tmp_path,
            small_config(),
            environment={
                "SLURM_JOB_ID": "1",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": "2",
                "SLURM_PROCID": str(i),
                "SLURM_LOCALID": str(i),
                "JAX_COORDINATOR_PORT": port,
            }.items(),
        )
        for port in [str(free_port())]
        for i in range(2)
    ]
    first, _ = finish(*pair)
    assert ", 2 x cpu (" in first
