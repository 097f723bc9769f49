"""The command as its users type it: each mistake costs seconds and gets one line."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from imgcls.errors import UserError
from imgcls.run import cli
from tests.commands import Command, run_command, run_fresh, run_main
from tests.helpers import ROOT, as_users, flags_of, small_config
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
    result = run_fresh("main.py", *arguments, env=as_users())
    assert result.returncode == 0, result.stderr
    scores, page, command = result.stdout.splitlines()[-3:]
    assert re.fullmatch(r"test top1 0\.\d{4} \(\d+/50\)  .*/results\.json", scores)
    assert str(workdir / "report.html") in page and (workdir / "report.html").is_file()
    typed = ["python", "-m", "imgcls", "predict", f"--workdir={workdir}", "FILE_OR_FOLDER"]
    assert shlex.split(command) == typed
    again = run_main(*arguments)
    assert again.returncode == 0 and "already finished" in again.stdout
    assert again.stdout.splitlines()[-1] == command


# What is typed, and what the answer holds. @: main.py with a config and a workdir.
TYPED = """
main.py --workdir=w  |  --config is missing
main.py --config=configs/digits.py  |  --workdir is missing
@ --config.seed=5 --config.seed  |  Missing value for flag --config.seed
main.py --config=configs/digits.py --workdir  |  Missing value for flag --workdir
@ stray  |  unexpected argument 'stray'
main.py configs/digits.py --workdir=w  |  did you mean --config=configs/digits.py?
main.py --config=digits --workdir=w  |  did you mean --config=configs/digits.py?
main.py --config configs/digts.py --workdir w  |  did you mean --config=configs/digits.py?
main.py --config=configs/Digits.py --workdir=w  |  did you mean --config=configs/digits.py?
main.py --config=configs --workdir=w  |  is no file: there are --config=configs/cifar10.py, --conf
main.py --config=nothing/like.it --workdir=w  |  is no file: there are --config=configs/cifar10.py
main.py --config=README.md --workdir=w  |  --config=README.md fails (SyntaxError: invalid
main.py --config=main.py --workdir=w  |  fails (KeyError: 'get_config'): name a file with get_con
main.py --config=configs/digits.py:resnet18 --workdir=w  |  digits.py offers no choice of a model
main.py --config=configs/image_folder.py:lenet --workdir=w  |  must be one of cnn
main.py --configs=configs/digits.py --workdir=w  |  --configs: did you mean --config?
main.py —config=configs/digits.py --workdir=w  |  did you mean --config=configs/digits.py?
main.py --config=configs/digits.py --wrkdir=w  |  no flag --wrkdir: did you mean --workdir?
@ --log_dir=w  |  there is no flag --log_dir: there are --config
@ --flagfile=no_such_file  |  there is no flag --flagfile: write its flags
@ --gpu=0  |  no flag --gpu: there are --config, --coordinator_addr
@ --debug=maybe  |  --debug=maybe must be true or false
@ --epochs=5  |  did you mean --config.train.epochs?
@ --batch-size=5  |  did you mean --config.train.batch_size?
@ --data_dir=x  |  did you mean --config.data.dir?
@ config.data.dir=x  |  did you mean --config.data.dir=x?
@ --config.data.path=x  |  did you mean --config.data.dir?
@ --config.train.epoch=5  |  did you mean --config.train.epochs?
main.py -config=configs/digits.py --workdir=w -config.seeds=5  |  did you mean --config.seed?
@ --config.lr=1  |  did you mean --config.optim.learning_rate?
@ --config.optim.learning_rat=1  |  --config.optim.learning_rate?
@ --config.train.label_smoothing=0  |  --config.task.label_smoothing?
@ --config.augment.flip=1  |  --config.augment.flip_probability?
@ --config.model.zzz=1  |  there are --config.model.name, --config.mod
@ --config.train.epochs=5.5  |  epochs=5.5 must be an integer
@ --config.train.accumulate_steps=0  |  steps=0 must be a whole number from 1
@ --config.optim.learning_rate=0,1  |  =0,1 must be a number
@ --config.optim.learning_rate=nan  |  learning_rate=nan must be
@ --config.data.alternate_flip=yes  |  =yes must be true or false
@ --config.data.image_size=(8,8  |  must be a tuple such as (32,32)
@ --config.data.image_size=8  |  must be (height, width)
@ --config.data.name=cifar-10  |  did you mean cifar10?
@ --config.data.name=mnits  |  did you mean mnist?
@ --config.model.name=cnm  |  must be one of cnn, mlp
@ --config.model.name=mlp  |  choose it with --config=FILE.py:mlp
@ --config.model.dtype=bf16  |  must be one of float32, bfloat16
@ --config.optim.name=adam  |  must be one of sgd, adamw
@ --config.optim.name adamw --config.seed=-1  |  config.seed=-1 must be
main.py --config.seed=-1 --config=configs/digits.py --workdir=w  |  config.seed=-1 must be
@ --config=configs/mnist.py --config.seed=-1  |  config.seed=-1 must be
@ --config.data.mean=(0.1,) --config.data.mean=(0.2,) --config.seed=-1  |  config.seed=-1 must be
main.py --config.seed=-1 --workdir=w  |  --config is missing
main.py --config=unfinished.py --workdir=w  |  get_config() must return a config, not None
main.py --config=configs/digits.py --workdir=gs://b/w  |  --workdir=gs://b/w is remote
@ train.epochs=5  |  there is no flag --train.epochs: did you mean --config.train.epochs?
@ --config.data.resize=pad  |  squash-bicubic, crop-bicubic, (empty)
@ --config.optim.schedule=cosin  |  must be one of constant, cosine
imgcls evalute --workdir=run  |  did you mean evaluate?
imgcls infer --workdir=run  |  it is one of train, evaluate, predict
imgcls --workdir=run predict x.png  |  it is one of train, evaluate, predict
imgcls evaluate run  |  did you mean --workdir=run?
imgcls evaluate --workdir=rnu  |  rnu/config.json does not exist: did you mean run?
imgcls evaluate --workdir=configs  |  --workdir must be the directory of a run
imgcls evaluate --workdir=run --split=val  |  must be one of test, validation, train
imgcls evaluate --workdir=run --data=run  |  did you mean --data_dir?
imgcls evaluate --workdir=run --config.data.path=x  |  did you mean --config.data.dir?
imgcls evaluate --workdir=run epochs=5  |  there is no flag --epochs: there are --checkpoint
imgcls evaluate --workdir=run --checkpoint=bset  |  no checkpoint bset: there are latest
imgcls predict --workdir=run  |  there is no file to predict
imgcls predict --workdir=run rnu  |  rnu does not exist: did you mean run?
imgcls predict --workdir=run --topk=3 run  |  did you mean --top?
imgcls predict --workdir=run --top run  |  --top=run must be an integer
imgcls predict --workdir=run --threshold=80 run  |  must be a number in the range [0, 1]
imgcls predict --workdir=run --threshold=nan run  |  --threshold=nan must be a number
imgcls compare --config.data.dir=x run run  |  there are --debug, --output, --workdir
imgcls predict --workdir=run --csv --json run  |  --json and --csv exclude each other
imgcls export --workdir=run --format=onxx --output=x  |  must be one of stablehlo, onnx, safetensors
imgcls sweep --config=configs/digits.py --workdir=w --space=optim.mmm=1  |  is not a key of
"""
TYPED = TYPED.strip().replace("@", f"main.py {DIGITS} --workdir=w").splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("typed")
    shutil.copytree(ROOT / "tests/fixtures/run", folder / "run")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "unfinished.py").write_text("def get_config():\n    pass\n")
    for name in ("main.py", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    yield folder
    assert not list((folder / "w" / "checkpoints").glob("*"))


@pytest.mark.parametrize("line", TYPED)
def test_what_is_mistyped_is_answered_in_one_sentence_with_the_nearest_or_the_list(folder, line):
    typed, _, expected = line.partition("  |  ")
    command = Command(*typed.split(" "), cwd=folder)
    printed, _ = command.communicate(timeout=40)
    (error,) = [text for text in printed.splitlines() if text.startswith("error: ")]
    assert command.returncode == 2 and expected in error and "Traceback" not in printed


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
    environment = os.environ | {"HOME": str(home)}
    return run_command("imgcls", "evaluate", "--checkpoint=5", *arguments, env=environment)


def test_paths_begin_at_home_and_keys_that_change_no_result_may_be_given(tmp_path):
    result = evaluate_kept(tmp_path, "--workdir=~/run", "--config.eval.batch_size=7")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run/results_test_5.json").exists()
    assert not (ROOT / "~").exists()


def test_other_keys_of_a_trained_run_are_refused_in_one_line(tmp_path):
    result = evaluate_kept(tmp_path, "--workdir=~/run", "--config.optim.learning_rate=1")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "learning_rate cannot be set after training: there are --config.data" in result.stderr


def run_in_process(monkeypatch, error, *typed):
    """cli.run of a command that raises `error`: its exit code."""
    for name in ("unraisablehook", "argv"):
        monkeypatch.setattr(sys, name, getattr(sys, name))

    def main(_):
        raise error

    command = SimpleNamespace(define_flags=lambda: None, main=main)
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: command, ["command", *typed])
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


@pytest.mark.parametrize("typed", ["--debug", "-debug", "--debug=true", "--debug=1", "--debug=0"])
def test_debug_may_be_written_as_any_flag(typed, monkeypatch, capsys):
    assert run_in_process(monkeypatch, UserError("wrong"), typed) == 2
    assert ("Traceback" in capsys.readouterr().err) == (typed != "--debug=0")


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
