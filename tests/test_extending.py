"""docs/extending.md: its code does what it says."""

import json
import re

import pytest

from imgcls.augment import AUGMENTATIONS
from imgcls.data.sources import SOURCES
from imgcls.models import MODELS
from imgcls.optim import OPTIMIZERS
from tests.helpers import ROOT

DOCUMENT = (ROOT / "docs" / "extending.md").read_text("utf-8")


@pytest.fixture
def tables_as_before():
    kept = [(table, dict(table)) for table in (AUGMENTATIONS, SOURCES, MODELS, OPTIMIZERS)]
    yield
    for table, entries in kept:
        table.clear()
        table.update(entries)


@pytest.mark.slow
def test_every_block_of_the_document_trains(tmp_path, monkeypatch, tables_as_before):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```$", DOCUMENT, re.M | re.S):
        exec(compile(block, "extending.md", "exec"), names)
    runs = re.findall(r'train_and_evaluate\(config, "(runs/\w+)"', DOCUMENT)
    assert len(runs) == 7
    for run in runs:
        results = json.loads((tmp_path / run / "results.json").read_text())
        assert results["loss"] > 0 and (tmp_path / run / "report.html").exists()
