"""Where it is installed: Colab as it is, what is said where something is missing, and Windows."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from imgcls.data import tfds
from imgcls.errors import UserError
from imgcls.run import machine
from tests.helpers import ROOT, as_users

OWN = {"jax", "numpy", "tensorflow", "tensorflow-cpu"}  # of a runtime such as Colab's


def requirements(file: str) -> dict[str, Requirement]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if line[:1] not in ("#", "")]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def test_colab_is_asked_for_all_but_what_it_must_keep():
    asked, all_of_it = requirements("requirements-colab.txt"), requirements("requirements.txt")
    assert asked == {name: r for name, r in all_of_it.items() if name not in OWN}


def test_nothing_that_colab_has_is_replaced():
    colab = requirements("tests/colab.txt")
    assert {"jax", "numpy", "tensorflow"} <= colab.keys()
    for name, requirement in requirements("requirements.txt").items():
        if name in colab:
            (version,) = colab[name].specifier
            assert version.version in requirement.specifier, requirement


@pytest.mark.slow
def test_the_notebook_s_first_cell_makes_colab_able(tmp_path):
    """Its command, on Colab's versions: digits are trained, and a dataset of TFDS is prepared."""
    if not os.environ.get("IMGCLS_COLAB"):
        pytest.skip("IMGCLS_COLAB=1 installs Colab's versions: minutes, and 3 GB that PyPI sends")
    pythons = [Path(shutil.which("python3.13") or "python3.13")]
    pythons += Path.home().glob(".pyenv/versions/3.13*/bin/python3.13")
    runs = lambda python: subprocess.run([python, "-c", ""], capture_output=True).returncode == 0
    if not (pythons := [python for python in pythons if python.exists() and runs(python)]):
        pytest.skip("there is no python3.13")
    notebook = json.loads((ROOT / "image_classification.ipynb").read_text())
    cell = "".join(next(c["source"] for c in notebook["cells"] if c["cell_type"] == "code"))
    (command,) = [line.strip() for line in cell.splitlines() if line.strip().startswith("%pip")]
    assert command == "%pip install --quiet --requirement requirements-colab.txt {more}"

    def run(*command) -> str:
        done = subprocess.run(
            [*map(str, command)], cwd=ROOT, env=as_users(), capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    run(pythons[0], "-m", "venv", tmp_path)
    python = tmp_path / "bin/python"
    run(python, "-m", "pip", "install", "--quiet", "-r", "tests/colab.txt")
    before = set(run(python, "-m", "pip", "freeze").splitlines())
    run(python, "-m", *command.removeprefix("%").split()[:-1])
    assert before < set(run(python, "-m", "pip", "freeze").splitlines())
    run(python, "-c", "import tensorflow")
    flags = "--config.train.epochs=2", "--config.train.validate_every_epochs=1"
    run(python, "main.py", "--config=configs/digits.py", f"--workdir={tmp_path}/run", *flags)
    assert json.loads((tmp_path / "run/results.json").read_text())["top1"] > 0.5
    run(python, "tests/data/make_tfds_datasets.py", tmp_path / "data")
    count = "import sys; from imgcls.data.sources import open_sources as o; "
    count += "print(len(o('tiny_tfrecord', data_dir=sys.argv[1], channels=3)['train']))"
    assert run(python, "-c", count, tmp_path / "data") == "120\n"


def test_where_tensorflow_is_missing_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match="mnist in .* needs TensorFlow: pip install tensorflow-cpu"):
        tfds.open_tfds("mnist", data_dir=str(tmp_path), channels=1)


def test_windows_gets_one_line():
    source = "import sys; sys.platform = 'win32'; import imgcls.__main__"
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "WSL" in result.stderr


@pytest.mark.parametrize("capability, said", [("7.5", True), ("8.0", False), ("10.0", False)])
def test_a_gpu_without_bfloat16_is_named(capability, said, monkeypatch, caplog):
    gpu = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    machine.tell_of_bfloat16.__wrapped__()
    assert ("(compute capability 7.5) has no bfloat16" in caplog.text) == said
