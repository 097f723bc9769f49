"""A run of an earlier version is used and continued: tests/fixtures/run, of commit 98cf4ab."""

import json
import shutil

import numpy as np
import pytest

from imgcls import experiment, load
from imgcls.config import flatten
from imgcls.evaluation.evaluate import evaluate
from imgcls.experiment import load_config
from imgcls.run import machine
from imgcls.run.checkpoint import Checkpoints
from imgcls.run.logs import read_metrics
from imgcls.train import train_and_evaluate
from tests.helpers import ROOT

KEPT = ROOT / "tests/fixtures/run"


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(KEPT, tmp_path / "run")


@pytest.fixture(scope="module")
def expected():
    with np.load(KEPT / "predictions.npz", allow_pickle=False) as saved:
        return dict(saved)


def test_it_is_evaluated_and_predicts_as_it_did(run, expected):
    classifier = load(run)
    (test,) = experiment.open_splits(classifier.config, "test")
    assert test.labels.tolist() == expected["labels"].tolist()
    results = evaluate(classifier, {"test": test}, run, split="test", checkpoint="5")
    assert results["step"] == 5
    with np.load(run / "predictions_test_5.npz", allow_pickle=False) as saved:
        np.testing.assert_allclose(saved["logits"], expected["logits"], atol=1e-5)
    shown = classifier(test.read(np.arange(3))["image"])
    assert shown.argmax(1).tolist() == expected["logits"][:3].argmax(1).tolist()


def test_it_is_resumed_and_keeps_every_commit(run, caplog):
    commit = Checkpoints(run / "checkpoints").read_meta()["trained_by"]["git_commit"]
    config = load_config(run)
    config.train.epochs = 2
    state = train_and_evaluate(config, run, test=False)
    assert state.step == 10
    assert {row["step"] for row in read_metrics(run / "metrics.jsonl")} == {10}
    commits = Checkpoints(run / "checkpoints").read_meta()["trained_by"]["git_commits"]
    assert commits == [commit, machine.describe()["git_commit"]]
    assert "devices was 1 x cpu" in caplog.text


def test_keys_that_came_since_have_their_defaults_and_those_that_went_cost_a_line(run, caplog):
    saved = json.loads((run / "config.json").read_text())
    del saved["data"]["alternate_flip"]
    saved["optim"]["label_smoothing"] = saved.pop("task")["label_smoothing"]
    saved["train"]["early_epochs"] = saved["train"].pop("small_epochs")
    saved["train"]["gone"] = 3
    whole = load_config(run)
    (run / "config.json").write_text(json.dumps(saved))
    assert flatten(load_config(run)) == flatten(whole)
    (record,) = caplog.records
    assert record.message == "config keys that this version no longer has: train.gone"
    assert load(run).state.step == 5
