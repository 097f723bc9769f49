"""The command that evaluates a finished run says what the end of training said."""

import csv
import dataclasses
import json
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from imgcls import experiment, load
from imgcls.config import to_json
from imgcls.errors import UserError
from imgcls.evaluation import evaluate as evaluation
from imgcls.evaluation import report
from imgcls.experiment import load_config, open_splits
from imgcls.run import machine
from imgcls.run.checkpoint import Checkpoints
from imgcls.run.workdir import claim, write_json
from imgcls.train import train_and_evaluate
from tests.commands import run_command, run_fresh
from tests.helpers import ROOT, all_images, as_users, small_config


def evaluate(workdir, *arguments, run=run_command):
    return run("imgcls", "evaluate", f"--workdir={workdir}", *arguments, env=as_users())


def run_report(workdir, run=run_command):
    return run("imgcls", "report", f"--workdir={workdir}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    train_and_evaluate(small_config(train__epochs=4), workdir)
    return workdir


def read(path):
    return json.loads(path.read_text())


def test_validation_and_the_best_checkpoint_go_to_files_of_their_own(finished):
    before = (finished / "results.json").read_bytes()
    result = evaluate(finished, "--split=validation", "--checkpoint=best", run=run_fresh)
    assert result.returncode == 0, result.stderr
    results = read(finished / "results_validation_best.json")
    assert (results["examples"], results["checkpoint"]) == (90, "best")
    with np.load(finished / "predictions_validation_best.npz", allow_pickle=False) as saved:
        assert results["top1"] == (saved["logits"].argmax(1) == saved["labels"]).mean()
    assert (finished / "results.json").read_bytes() == before


def test_mistakes_are_kept_for_the_report_and_contradicted_labels_for_their_owner(finished):
    results = read(finished / "results.json")
    with np.load(finished / "predictions.npz", allow_pickle=False) as saved:
        wrong = np.flatnonzero(saved["logits"].argmax(1) != saved["labels"])
        assert set(saved["mistakes"]) <= set(wrong) and len(saved["mistakes"]) == min(
            24, len(wrong)
        )
        assert saved["looked_at"].shape == (len(saved["mistakes"]), 4, 4)
        ids = saved["ids"].tolist()
    with open(finished / "label_issues.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == results["label_issues"]["examples"] > 0
    assert {row["split"] for row in rows} == {"test", "validation"}
    for row, first in zip(rows, results["label_issues"]["first"]):
        assert row == {key: str(value) for key, value in first.items()}
        assert float(row["p_suggested"]) > float(row["p_given"])
    rows = [row for row in rows if row["split"] == "test"]
    assert all(ids[int(row["row"])] == row["id"] for row in rows)
    assert {int(row["row"]) for row in rows} <= set(wrong)


@pytest.mark.slow
def test_labels_of_train_are_never_said_to_be_wrong(finished):
    before = {path.name for path in finished.glob("label_issues*")}
    result = evaluate(finished, "--split=train")
    assert result.returncode == 0 and "contradicts" not in result.stdout
    assert "label_issues" not in read(finished / "results_train_latest.json")
    assert {path.name for path in finished.glob("label_issues*")} == before


def test_the_test_split_again_gives_the_same_and_is_counted(finished):
    before = read(finished / "results.json")
    seals = lambda: (finished / "test_evaluations.jsonl").read_text().splitlines()
    looks = len(seals())
    result = evaluate(finished, "--tta=shifts")
    assert result.returncode == 0, result.stderr
    after = read(finished / "results.json")
    views = after.pop("test_time_augmentation")
    assert views["views"] == "shifts" and 0 <= views["top1"] <= 1
    for key in ("top1", "confusion_matrix", "step", "examples"):
        assert after[key] == before[key]
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert len(seals()) == looks + 1
    assert json.loads(seals()[-1]).items() >= {"checkpoint": "latest", "step": 20}.items()


def test_load_takes_the_checkpoint_that_the_config_names(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    Checkpoints(workdir / "checkpoints").record(15, {"top1": 1.0})
    for named, step in (("latest", 20), ("best", 15)):
        config = load_config(workdir)
        config.eval.checkpoint = named
        write_json(workdir / "config.json", to_json(config))
        assert load(workdir).state.step == step
        assert load(workdir, "15").state.step == 15


def test_the_first_steps_of_an_average_of_the_parameters_cannot_be_the_best(finished):
    assert load_config(finished).optim.ema_decay > 0
    scores = read(finished / "checkpoints/validation.json")
    assert [(step, bool(score)) for step, score in scores.items()] == [
        ("5", False), ("10", False), ("15", False), ("20", True)
    ]  # fmt: skip


def test_an_evaluation_elsewhere_keeps_the_training_s_device_and_commit(finished, monkeypatch):
    before = read(finished / "results.json")
    elsewhere = {"device": "another", "versions": {}, "git_commit": "f" * 40}
    classifier = load(finished)
    (split,) = experiment.open_splits(classifier.config, "validation")
    monkeypatch.setattr(machine, "describe", lambda: elsewhere)
    after = evaluation.evaluate(
        classifier, {"validation": split}, finished, split="validation", checkpoint="latest"
    )
    assert after["evaluated_by"] == elsewhere
    assert all(after[key] == before[key] for key in elsewhere)


@pytest.mark.slow
def test_official_results_are_not_written_beside_a_run_at_work(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with claim(workdir):
        refused = [evaluate(workdir), run_report(workdir)]
        other = evaluate(workdir, "--checkpoint=20")
    for result in refused:
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert f"is in use by process {os.getpid()}" in result.stderr
    assert "name a --split or --checkpoint whose results have a file of their own" in (
        refused[0].stderr
    )
    assert other.returncode == 0 and (workdir / "results_test_20.json").exists()
    official = {path for path in before if path.name not in (".lock", "test_evaluations.jsonl")}
    assert all(path.read_bytes() == before[path] for path in official)


def test_mistakes_are_refused_in_one_line(finished, tmp_path):
    for arguments, code, message in [
        ([f"--workdir={tmp_path}"], 2, "config.json does not exist"),
        ([f"--workdir={finished}", "--checkpoint=77"], 4, "has no checkpoint 77: there are"),
        ([f"--workdir={finished}", "--split=tset"], 2, "--split"),
    ]:
        result = evaluate(finished, *arguments)
        assert result.returncode == code and "Traceback" not in result.stderr
        assert message in result.stderr and result.stderr.count("error: ") == 1


def test_data_of_other_classes_is_refused_before_the_test_split_counts_as_seen(finished):
    classifier = load(finished)
    (split,) = experiment.open_splits(classifier.config, "test")
    renamed = dataclasses.replace(split, class_names=split.class_names[::-1])
    before = {path: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    with pytest.raises(UserError, match="the classes of the data are no longer those"):
        evaluation.evaluate(
            classifier, {"test": renamed}, finished, split="test", checkpoint="latest"
        )
    assert {path: path.read_bytes() for path in finished.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("name", ["test", "validation"])
def test_other_pictures_are_refused_before_the_test_split_counts_as_seen(finished, name):
    classifier = load(finished)
    splits = dict(zip(("test", "validation"), open_splits(classifier.config, "test", "validation")))
    digests = splits[name].digests.copy()
    digests[[12, 33]] ^= 1
    splits[name] = dataclasses.replace(splits[name], digests=digests)
    before = {path: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=rf"2 of \d+ {name} pictures changed, first \d+: "):
        evaluation.evaluate(classifier, splits, finished, split="test", checkpoint="latest")
    assert {path: path.read_bytes() for path in finished.iterdir() if path.is_file()} == before


def test_pictures_first_seen_by_an_evaluation_are_those_of_the_report(tmp_path, monkeypatch):
    config = small_config(train__epochs=1, data__validation="")
    train_and_evaluate(config, tmp_path, test=False)
    (test,) = open_splits(config, "test")
    evaluation.evaluate(load(tmp_path), {"test": test}, tmp_path, split="test", checkpoint="latest")
    changed = dataclasses.replace(test, digests=test.digests[::-1])
    monkeypatch.setattr(report, "open_splits", lambda *_: [changed])
    monkeypatch.setattr(report.cli, "required_workdir", lambda: tmp_path)
    page = (tmp_path / "report.html").read_bytes()
    with pytest.raises(UserError, match="50 of 50 test pictures changed"):
        report.main([])
    with pytest.raises(UserError, match="50 of 50 test pictures changed"):
        train_and_evaluate(
            config, tmp_path, splits={"train": open_splits(config, "train")[0], "test": changed}
        )
    assert (tmp_path / "report.html").read_bytes() == page


def test_a_workdir_that_cannot_be_written_is_an_error_of_the_user(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    seals = workdir / "test_evaluations.jsonl"
    seals.unlink()
    seals.mkdir()  # root, too, may not write this
    result = evaluate(workdir)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"error: {workdir} cannot be written: Is a directory" in result.stderr


def test_a_report_of_other_examples_is_refused(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    with np.load(workdir / "predictions.npz", allow_pickle=False) as saved:
        arrays = dict(saved)
    np.savez(workdir / "predictions.npz", **arrays | {"ids": arrays["ids"][::-1]})
    result = run_report(workdir, run=run_fresh)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "the test examples are no longer those of" in result.stderr


@pytest.fixture
def elsewhere(finished, tmp_path):
    """A folder of validation pictures: not of class 3, and some of no class of the run."""
    (split,) = open_splits(load_config(finished), "validation")
    for i, (image, label) in enumerate(zip(all_images(split), split.labels)):
        folder = tmp_path / "pictures" / ("letters" if label == 3 else str(label)) / "more"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / f"{i}.png")
    return tmp_path / "pictures"


def test_another_folder_is_evaluated_by_the_names_of_its_classes_and_is_no_look_at_the_test_split(
    finished, elsewhere, monkeypatch, capsys, caplog
):
    before = {path: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    flags = {"workdir": finished, "split": "test", "checkpoint": "", "tta": None}
    flags = SimpleNamespace(data_dir="", **flags)
    monkeypatch.setattr(evaluation.flags, "FLAGS", flags)
    monkeypatch.setattr(evaluation.cli, "required_workdir", lambda: finished)
    monkeypatch.setattr(experiment, "harmless", dict)
    with pytest.raises(UserError, match="--data_dir= is not a directory"):  # an unset variable
        evaluation.main([])
    flags.data_dir = str(elsewhere)
    (elsewhere / "0/notes.txt").touch()
    with caplog.at_level("INFO"):
        evaluation.main([])
    name = f"on_{elsewhere.parent.name}-pictures_latest"
    results = read(finished / f"results_{name}.json")
    with np.load(finished / f"predictions_{name}.npz") as saved:
        logits, labels, ids = (saved[key] for key in ("logits", "labels", "ids"))
    assert [path.split("/")[0].removeprefix("pictures:") for path in ids] == labels.astype(
        str
    ).tolist()
    assert results["examples"] == len(labels) < 90
    assert results["top1"] == (logits.argmax(1) == labels).mean()
    assert results["split"] == f"{elsewhere} without letters"
    for text in ("left out: letters", "has no pictures of 3", "left out: 1 .txt"):
        assert text in caplog.text
    matrix = np.array(results["confusion_matrix"])
    np.fill_diagonal(matrix, 0)
    *_, scores, confused = capsys.readouterr().out.splitlines()
    assert f"top1 {results['top1']:.4f}" in scores
    assert re.match(rf"confused most: \d as \d {matrix.max()}", confused)
    after = {path: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    assert {path: content for path, content in after.items() if path in before} == before


def test_a_folder_without_pictures_of_the_classes_is_refused(finished, elsewhere):
    classifier = load(finished)
    with pytest.raises(UserError, match="no folder of pictures of the classes 0, .*: its.* more"):
        evaluation.open_other(classifier, str(elsewhere / "letters"))
    with pytest.raises(UserError, match=f"a directory: did you mean {elsewhere / 'letters'}"):
        evaluation.open_other(classifier, str(elsewhere / "leters"))
    for name in ("", str(ROOT / "README.md")):
        with pytest.raises(UserError, match=f"--data_dir={name} is not a directory: name one"):
            evaluation.open_other(classifier, name)
    classifier.config.data.ignore = "more"
    with pytest.raises(UserError, match="no folder of pictures"):
        evaluation.open_other(classifier, str(elsewhere))


def test_views_are_shifts_and_mirror_images_of_the_picture():
    images = np.arange(2 * 5 * 6 * 1, dtype=np.uint8).reshape(2, 5, 6, 1)
    plain, mirrored = evaluation.VIEWS["flip"](images)
    np.testing.assert_array_equal(plain, images)
    np.testing.assert_array_equal(mirrored[:, :, ::-1], images)
    views = evaluation.VIEWS["shifts"](images)
    np.testing.assert_array_equal(views[0], images)
    np.testing.assert_array_equal(views[2][:, 1:, 1:], images[:, :-1, :-1])
    np.testing.assert_array_equal(views[4][:, :-1, :-1], images[:, 1:, 1:])
    assert len(views) == 6 and all(view.shape == images.shape for view in views)
