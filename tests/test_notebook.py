"""The notebook as a student meets it: carrying its outputs, and running from top to bottom."""

import ast
import contextlib
import copy
import importlib
import io
import os
import re
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from imgcls.config import default_config, validate
from imgcls.tuning.space import canonical, config_at, halton_points
from tests.helpers import ROOT, as_users

nbformat = pytest.importorskip("nbformat", reason="pip install -r requirements-dev.txt")

NOTEBOOK = ROOT / "image_classification.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def errors(notebook) -> list[str]:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [output.evalue for output in outputs if output.output_type == "error"]


def pictures(notebook) -> int:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_every_code_cell_carries_outputs_of_one_execution_without_errors(notebook):
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells)
    assert not errors(notebook)
    streams = [output for cell in cells for output in cell.outputs if "name" in output]
    assert {output.name for output in streams} == {"stdout"}  # no warning is left for the reader
    assert NOTEBOOK.stat().st_size < 1_500_000


def test_prose_says_why_before_each_cell_shows_how(notebook):
    kinds = [cell.cell_type for cell in notebook.cells]
    after_code = [i for i in range(1, len(kinds)) if kinds[i - 1 : i + 1] == ["code", "code"]]
    assert after_code == [3]  # the set-up: what Colab needs, then the imports


def test_the_code_uses_the_package_and_repeats_none_of_it(notebook):
    transformer = pytest.importorskip("IPython.core.inputtransformer2").TransformerManager()
    source = "\n".join(transformer.transform_cell(cell.source) for cell in code_cells(notebook))
    tree = ast.parse(source)
    assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(tree))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {"imgcls", "imgcls.train"} <= modules
    assert "nn.Module" not in source and "flax" not in source and "optax" not in source
    assert source.count("DATASET = ") == 1 and 'DATASET = "digits"' in source


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "mnist", "fashion_mnist"])
def test_shorter_runs_of_each_dataset_that_it_offers_have_valid_configs(
    notebook, dataset, tmp_path
):
    get_config = importlib.import_module(f"configs.{dataset}").get_config
    names = {"config": get_config(), "train": range(1293), "default_config": default_config}
    names |= {"deepcopy": copy.deepcopy}
    names |= {"contextlib": contextlib, "io": io, "jax": jax, "tempfile": tempfile, "Path": Path}
    checked = []

    def sweep(config, space, trials, **_):
        points, _ = halton_points(canonical(space), config, trials, seed=0)
        checked.extend(validate(config_at(config, point)) for point in points)

    names |= {"RUNS": tmp_path, "sweep": sweep}
    names["run"] = lambda config, name: checked.append(validate(config))
    for cell in code_cells(notebook):
        if "without_test(" in cell.source:  # its runs come before what it draws
            exec(re.split("^_, ", cell.source, flags=re.M)[0], names)
    assert len(checked) == 3 + 10


def execute(notebook, folder, environment):
    nbclient = pytest.importorskip("nbclient", reason="pip install -r requirements-dev.txt")
    pytest.importorskip("ipykernel", reason="pip install -r requirements-dev.txt")
    for cell in code_cells(notebook):
        cell.outputs = []
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=600, resources=resources)
    client.execute(env=environment | {"PYTHONPATH": str(ROOT)})  # a failing cell raises


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_on_the_embedded_digits(notebook, tmp_path):
    committed = pictures(notebook)
    execute(notebook, tmp_path, as_users())
    assert pictures(notebook) == committed > 10
    assert len(list(tmp_path.glob("runs/*/results.json"))) == 1 + 3 + 1
    assert os.listdir(tmp_path) == ["runs"]


@pytest.mark.slow
def test_it_runs_on_a_folder_of_two_classes(notebook, tmp_path):
    rng = np.random.default_rng(0)
    for name, brightest in (("dark", 160), ("a bright one", 256)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(60):
            pixels = rng.integers(0, brightest, (12, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    small = "config.data.image_size, config.model.widths, config.train.epochs = (8, 8), (8, 8), 2"
    shorter = {
        'DATASET = "digits"': 'DATASET = "photos"',
        "config.data.dir = str(folder)": f"config.data.dir = str(folder)\n    {small}",
        "epochs = 150": "epochs = 2",
        "trials=10": "trials=2",
        "seeds=3": "seeds=1",
    }
    for old, new in shorter.items():
        (cell,) = (cell for cell in code_cells(notebook) if old in cell.source)
        cell.source = cell.source.replace(old, new)
    committed = pictures(notebook)
    execute(notebook, tmp_path, {**os.environ})  # which compiles faster
    assert pictures(notebook) == committed
    assert "top-5" not in "".join(str(cell.outputs) for cell in code_cells(notebook))
