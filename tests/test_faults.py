"""Nothing is lost: real processes, real signals.

A run that was killed and started again ends bit for bit where the run that was never killed does.
"""

import json
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from imgcls.run.logs import read_metrics
from imgcls.run.signals import PAIR_SECONDS
from imgcls.run.workdir import claim
from tests.commands import Command, run_fresh, run_main
from tests.helpers import ROOT, as_users, flags_of, small_config
from tests.test_train import EVERYTHING, without_times

DIGITS = "--config=configs/digits.py"
LONGER = EVERYTHING | {"train__epochs": 20, "train__log_every_steps": 7}


def start(workdir, config, program=("main.py",), **options) -> Command:
    flags = [DIGITS, f"--workdir={workdir}", *flags_of(config)]
    return Command(*program, *flags, env=as_users(), **options)


def read_until(process, text) -> str:
    """Everything that the process printed up to the first line with `text` in it."""
    printed = ""
    for line in process.stdout:
        printed += line
        if text in line:
            return printed
    raise AssertionError(f"{text!r} never came:\n{printed}")


def finish(workdir, config):
    result = run_main(DIGITS, f"--workdir={workdir}", *flags_of(config))
    assert result.returncode == 0, result.stderr
    return result


def final_arrays(workdir):
    """Every array of the last checkpoint, as bytes by their SHA-256, and what is logged."""
    from imgcls.run.checkpoint import Checkpoints

    meta = Checkpoints(workdir / "checkpoints", read_only=True).read_meta()
    (results,) = without_times([json.loads((workdir / "results.json").read_text())])
    with np.load(workdir / "predictions.npz", allow_pickle=False) as saved:
        logits = saved["logits"].tobytes()
    return meta["leaves"], logits, without_times(read_metrics(workdir / "metrics.jsonl")), results


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    finish(workdir, small_config(**LONGER))
    return workdir


@pytest.fixture(scope="module")
def uninterrupted(whole_run):
    return final_arrays(whole_run)


def kill_and_resume(workdir, kills, seed):
    """Kills a run at `kills` random moments between its start and its end, then lets it finish."""
    moments = random.Random(seed)
    config = small_config(**LONGER)
    for kill in range(kills):
        with start(workdir, config) as process:
            if moments.random() < 0.8:  # else anywhere before the first step
                read_until(process, "training:")
            timer = threading.Timer(moments.uniform(0, 1.5), process.kill)
            timer.start()
            last_step = 90 * (kill + 1) / kills  # on a fast machine too, the later kills find work
            for line in process.stdout:
                if line.startswith("step ") and int(line.split()[1]) >= last_step:
                    process.kill()
            timer.cancel()
        assert process.returncode == -signal.SIGKILL
    finish(workdir, config)


@pytest.mark.slow
def test_twelve_kills_change_nothing(uninterrupted, tmp_path):
    kill_and_resume(tmp_path, kills=12, seed=1)
    assert final_arrays(tmp_path) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("sent, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_present_step(uninterrupted, tmp_path, sent, code):
    config = small_config(**LONGER)
    process = start(tmp_path, config)
    read_until(process, "step 35 ")
    process.send_signal(sent)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == code, printed
    assert f"stopped by {sent.name}: step " in printed
    step = int(printed.split("step ")[-1].split()[0])
    resumed = finish(tmp_path, config)
    assert f"resumed at step {step} of 100" in resumed.stdout
    assert final_arrays(tmp_path) == uninterrupted


@pytest.mark.slow
def test_a_run_that_is_stopped_in_every_phase_is_the_run_that_was_never_stopped(
    uninterrupted, tmp_path
):
    config = small_config(**LONGER)

    def stop(where, *signals):
        process = start(tmp_path, config, ("tests.slowed", where))
        read_until(process, f"now: {where}" if len(signals) == 1 else "training:")
        process.send_signal(signals[0])
        if len(signals) > 1:
            read_until(process, f"now: {where}")
            time.sleep(PAIR_SECONDS)  # two at once count as one
            process.send_signal(signals[1])
        printed, _ = process.communicate(timeout=60)
        assert "Traceback" not in printed
        return process.returncode, printed

    code, printed = stop("validation", signal.SIGTERM)
    assert code == 143 and "step 5 is saved" in printed, printed
    code, printed = stop("save", signal.SIGTERM)
    assert code == 143 and re.search(r"step 1[01] is saved", printed), printed
    # Nothing that hangs holds back the second signal.
    code, printed = stop("a disk that hangs", signal.SIGTERM, signal.SIGINT)
    assert code == 130 and "is saved" not in printed, printed
    code, printed = stop("evaluation", signal.SIGTERM)
    assert code == 143 and printed.endswith("training is saved; the same command evaluates\n")
    assert not (tmp_path / "results.json").exists()
    finish(tmp_path, config)
    assert final_arrays(tmp_path) == uninterrupted


def test_a_signal_while_a_dataset_is_being_prepared(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes requests and never answers
        silent.settimeout(100)
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(variable, proxy)
        mnist = small_config(data__name="mnist", data__dir=str(tmp_path / "data"))
        process = start(tmp_path / "run", mnist)
        with silent.accept()[0]:
            process.terminate()
            printed, _ = process.communicate(timeout=30)  # until the child has closed it, too
    assert process.returncode == 143, printed
    assert "preparing mnist" in printed and "Traceback" not in printed
    assert "stopped by SIGTERM: nothing to save yet" in printed


@pytest.mark.parametrize(
    "moment", [pytest.param("train: 200 examples", marks=pytest.mark.slow), "compiling"]
)
def test_a_signal_before_the_first_step_says_that_there_is_nothing_to_save(tmp_path, moment):
    process = start(tmp_path, small_config())
    read_until(process, moment)
    process.terminate()
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 143, printed
    assert printed.splitlines()[-1] == "stopped by SIGTERM: nothing to save yet"
    assert "Traceback" not in printed


def test_two_runs_in_one_workdir(tmp_path):
    config = small_config(**LONGER)
    first = start(tmp_path, config)
    read_until(first, "compiling")
    second = run_main(DIGITS, f"--workdir={tmp_path}", *flags_of(config))
    assert second.returncode == 2 and f"in use by process {first.pid}" in second.stderr
    assert first.poll() is None
    first.kill()  # a killed run's lock is free at once
    first.communicate()
    with claim(tmp_path):
        pass


@pytest.mark.slow
def test_only_damaged_checkpoints_are_an_error_of_the_command(whole_run, tmp_path):
    config = small_config(**LONGER)
    shutil.copytree(whole_run, tmp_path / "run")
    checkpoints = tmp_path / "run/checkpoints"
    (checkpoints / "500").mkdir()
    ignored = finish(tmp_path / "run", config)
    assert "already finished" in ignored.stdout
    assert "500 is damaged or was never finished; renamed to damaged-500" in ignored.stderr
    for step in checkpoints.glob("[0-9]*"):
        shutil.rmtree(step / "state")
    result = run_main(DIGITS, f"--workdir={tmp_path / 'run'}", *flags_of(config))
    assert result.returncode == 4 and "Traceback" not in result.stderr
    assert "error: " in result.stderr and "none of the checkpoints" in result.stderr


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_keeps_the_earlier_checkpoints(uninterrupted, tmp_path):
    config = small_config(**LONGER)
    process = start(tmp_path, config)
    read_until(process, "step 35 ")
    process.terminate()
    process.communicate()

    full = start(tmp_path, config)
    resource.prlimit(full.pid, resource.RLIMIT_FSIZE, (4000, 4000))
    printed, _ = full.communicate(timeout=60)
    assert full.returncode == 4, printed
    assert printed.splitlines()[-1].startswith("error: ") and "Traceback" not in printed
    finish(tmp_path, config)
    assert final_arrays(tmp_path) == uninterrupted


@pytest.mark.slow
def test_a_reader_that_leaves_does_not_end_the_run(uninterrupted, tmp_path):
    process = start(tmp_path, small_config(**LONGER), stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    process.stderr.close()
    assert final_arrays(tmp_path) == uninterrupted


@pytest.mark.slow
def test_the_surroundings_do_not_matter(uninterrupted, tmp_path, monkeypatch):
    environment = as_users() | {"PYTHONHASHSEED": "7", "LC_ALL": "C", "TZ": "Asia/Tokyo"}
    command = [sys.executable, str(ROOT / "main.py"), f"--config={ROOT / 'configs/digits.py'}"]
    command += ["--workdir=a/relative one", *flags_of(small_config(**LONGER))]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert final_arrays(tmp_path / "a/relative one") == uninterrupted


@pytest.mark.slow
def test_the_digits_config_reaches_what_the_readme_promises(tmp_path):
    result = run_fresh("main.py", DIGITS, f"--workdir={tmp_path}", env=as_users())
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "results.json").read_text())["top1"] >= 0.99
