"""The command as its users type it: each mistake costs seconds and gets one line."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from imgcls.run import cli
from tests.helpers import ROOT, flags_of, run_main, small_config
from tests.test_faults import LONGER

DIGITS = "--config=configs/digits.py"


def refused(*arguments, code=2):
    """The one line that the command printed."""
    result = run_main(*arguments)
    assert result.returncode == code, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in result.stderr
    return errors[0]


@pytest.fixture
def elsewhere(tmp_path):
    """A directory on another file system than the caches are on, where there is one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as path:
        yield Path(path)


def test_the_command_trains_evaluates_and_says_where_to_look(elsewhere):
    workdir = elsewhere / "a run, with spaces and ünïcödé"
    arguments = [DIGITS, f"--workdir={workdir}", *flags_of(small_config(**LONGER))]
    result = run_main(*arguments)
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert re.fullmatch(r"test top1 0\.\d{4} \(\d+/50\)  .*/results\.json", last)
    again = run_main(*arguments)
    assert again.returncode == 0 and "already finished" in again.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--workdir=w"], "--config is missing"),
        ([DIGITS], "--workdir is missing"),
        (
            [DIGITS, "--workdir=w", "--config.optim.learning_rat=1"],
            "config.optim.learning_rate?",
        ),
        (
            [DIGITS, "--workdir=w", "--epochs=5"],
            "did you mean --config.train.epochs?",
        ),
        ([f"{DIGITS}:resnet18", "--workdir=w"], "configs/digits.py offers no choice of a model"),
        (["--config=configs/digts.py", "--workdir=w"], "did you mean --config=configs/digits.py?"),
        ([DIGITS, "--workdir=w", "--config.optim.learning_rate=nan"], "learning_rate=nan must be"),
        ([DIGITS, "--workdir=w", "--config.train.epochs=1.5"], "config.train.epochs"),
        ([DIGITS, "--workdir=w", "--config.data.name=mnits"], "mnist"),
        ([DIGITS, "--workdir=w", "--config.model.name=cnm"], "one of cnn, mlp"),
        ([DIGITS, "--workdir=w", "--wrkdir=x"], "no flag --wrkdir: did you mean --workdir?"),
        ([DIGITS, "--workdir=w", "stray"], "unexpected argument 'stray'"),
        (["--config=configs/nothing.py", "--workdir=w"], "configs/nothing.py"),
        (["--config=digits", "--workdir=w"], "did you mean --config=configs/digits.py?"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_refused_in_one_line(tmp_path, arguments, message):
    arguments = [a.replace("--workdir=w", f"--workdir={tmp_path / 'w'}") for a in arguments]
    assert re.search(message, refused(*arguments))


def test_a_workdir_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert f"--workdir={tmp_path / 'file'}" in refused(DIGITS, f"--workdir={tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "mine"
    inside = tmp_path / "file" / "run"
    assert f"--workdir={inside}" in refused(DIGITS, f"--workdir={inside}")
    assert "--workdir=/proc/run cannot be used" in refused(DIGITS, "--workdir=/proc/run")


def evaluate_kept(home, *arguments):
    """imgcls evaluate of a copy of the run in tests/fixtures, in a home directory."""
    shutil.copytree(ROOT / "tests/fixtures/run", home / "run", dirs_exist_ok=True)
    command = [sys.executable, "-m", "imgcls", "evaluate", "--checkpoint=5", *arguments]
    environment = os.environ | {"HOME": str(home)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_paths_begin_at_home_and_keys_that_change_no_result_may_be_given(tmp_path):
    result = evaluate_kept(tmp_path, "--workdir=~/run", "--config.eval.batch_size=7")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run/results_test_5.json").exists()
    assert not (ROOT / "~").exists()


def test_other_keys_of_a_trained_run_are_refused_in_one_line(tmp_path):
    result = evaluate_kept(tmp_path, "--workdir=~/run", "--config.optim.learning_rate=1")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "learning_rate cannot be set after training, only --config.data" in result.stderr


def run_in_process(monkeypatch, error):
    """cli.run of a command that raises `error`: its exit code."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    def main(_):
        raise error

    command = SimpleNamespace(define_flags=lambda: None, main=main)
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: command, ["command"])
    return left.value.code


@pytest.mark.parametrize(
    "error, code",
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), 2),
        (jax.errors.JaxRuntimeError("INTERNAL: imgcls_conv: MemoryError: oneDNN"), 2),
        (MemoryError(), 2),
        (jax.errors.JaxRuntimeError("INTERNAL: something else"), 1),
    ],
)
def test_too_little_memory_says_what_to_change(error, code, monkeypatch, capsys):
    assert run_in_process(monkeypatch, error) == code
    printed = capsys.readouterr().err
    assert ("Traceback" in printed) == (code == 1)
    if code == 2:
        (line,) = printed.splitlines()
        for remedy in ("train.batch_size", "train.accumulate_steps", "eval.batch_size", "model"):
            assert f"config.{remedy}" in line


def test_a_model_too_large_for_the_memory_says_what_to_change(tmp_path):
    huge = "--config.model.dense_widths=(200000, 200000)"  # 640 GB with the optimizer's
    arguments = [DIGITS, f"--workdir={tmp_path}", *flags_of(small_config()), huge]
    result = run_main(*arguments)
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: out of memory (")
    assert "Traceback" not in result.stderr


def test_debug_adds_the_traceback(tmp_path):
    result = run_main(DIGITS, f"--workdir={tmp_path}", "--config.train.epochs=0", "--debug")
    assert result.returncode == 2 and "Traceback" in result.stderr and "\nerror: " in result.stderr


def test_help_tells_how_to_start():
    result = run_main("--help")
    assert result.returncode == 0
    assert "python main.py --config=configs/cifar10.py --workdir=" in result.stdout
    assert "--debug" in result.stdout and "--workdir" in result.stdout


def test_importing_the_project_imports_neither_tensorflow_nor_what_only_reports_need():
    code = (
        "import sys, imgcls, imgcls.train, imgcls.evaluation.evaluate; from imgcls import load; "
        "print({'tensorflow', 'sklearn', 'matplotlib'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stdout + result.stderr
