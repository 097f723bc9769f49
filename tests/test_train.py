"""Whole runs: a stopped and resumed run is the run that was never stopped."""

import errno
import hashlib
import json
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from imgcls import train
from imgcls.augment import AUGMENTATIONS
from imgcls.config import flatten
from imgcls.data.sources import SOURCES
from imgcls.errors import CheckpointError, DivergedError, Stopped, UserError
from imgcls.experiment import Experiment, load_config
from imgcls.run import signals
from imgcls.run.checkpoint import Checkpoints
from imgcls.run.logs import MetricWindow, read_lines, read_metrics
from imgcls.train import train_and_evaluate
from tests.helpers import read_events, small_config

# Everything on that carries state from step to step, or draws at random.
EVERYTHING = {
    "model__dropout_rate": 0.2,
    "augment__mixup_alpha": 0.2,
    "augment__rotate_degrees": 10.0,
    "optim__ema_decay": 0.9,
    "train__accumulate_steps": 2,
    "train__small_epochs": 1.2,
    "train__small_image_size": (6, 6),
}


def stop_after(monkeypatch, step):
    """Sends SIGTERM to this process when the batch of training step number `step` is read."""
    train_batch = Experiment.train_batch

    def and_stop(self, at):
        # Compilations read a batch, too, in another thread.
        if at == step - 1 and threading.current_thread() is threading.main_thread():
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(Stopped):
                while True:  # until it has arrived
                    signals.poll()
        return train_batch(self, at)

    monkeypatch.setattr(Experiment, "train_batch", and_stop)


def without_times(rows):
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows
    ]


def outcome(workdir):
    """What a run leaves behind, times aside."""
    (results,) = without_times([json.loads((workdir / "results.json").read_text())])
    return without_times(read_metrics(workdir / "metrics.jsonl")), results


def assert_events_are_whole(workdir):
    """TensorBoard has what was logged until a run's one session ended."""
    steps = {event.step for event in read_events(workdir) if event.HasField("summary")}
    assert {row["step"] for row in read_metrics(workdir / "metrics.jsonl")} <= steps


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return train_and_evaluate(small_config(**EVERYTHING), workdir), workdir


@pytest.mark.parametrize("step", [5, 7], ids=["after an epoch", "within an epoch and a log window"])
def test_stopped_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"step {step} is saved"):
        stop_after(patch, step)
        train_and_evaluate(small_config(**EVERYTHING), tmp_path)
    assert not (tmp_path / "results.json").exists()
    assert_events_are_whole(tmp_path)
    state = train_and_evaluate(small_config(**EVERYTHING), tmp_path)
    assert_same(state, uninterrupted[0])
    assert outcome(tmp_path) == outcome(uninterrupted[1])


def test_another_seed_in_another_thread_is_another_run(uninterrupted, tmp_path):
    with ThreadPoolExecutor(1) as executor:
        config = small_config(**EVERYTHING, seed=1)
        state = executor.submit(train_and_evaluate, config, tmp_path).result()
    with pytest.raises(AssertionError):
        assert_same(state.params, uninterrupted[0].params)


def test_what_a_run_leaves_behind(uninterrupted):
    _, workdir = uninterrupted
    rows, results = outcome(workdir)
    assert [(r["split"], r["step"]) for r in rows] == [
        ("train", 3), ("validation", 5), ("train", 6), ("train", 9), ("train", 10),
        ("validation", 10),
    ]  # fmt: skip
    keys = {"step", "epoch", "split", "loss", "top1", "learning_rate"}
    assert all(set(row) == keys for row in rows)
    expected = {
        "dataset": "digits", "split": "test[:50]", "examples": 50, "step": 10, "epochs": 2,
        "seed": 0, "checkpoint": "latest",
    }  # fmt: skip
    assert results.items() >= expected.items()
    assert {"top1", "top5", "loss", "device", "versions", "git_commit"} <= set(results)
    assert results["git_commits"] == [results["git_commit"]]
    assert np.sum(results["confusion_matrix"]) == 50
    assert list(workdir.glob("events.out.tfevents.*"))
    assert flatten(load_config(workdir)) == flatten(small_config(**EVERYTHING))
    with Image.open(workdir / "first_batch.png") as picture:
        assert picture.size == (8 * 6, 5 * 6), "40 images as the first step sees them"
    with np.load(workdir / "predictions.npz", allow_pickle=False) as saved:
        assert saved["logits"].shape == (50, 10) and len(set(saved["ids"])) == 50
        accuracy = (saved["logits"].argmax(1) == saved["labels"]).mean()
    assert results["top1"] == pytest.approx(accuracy)
    assert len((workdir / "test_evaluations.jsonl").read_text().splitlines()) == 1


def test_starting_a_finished_run_again_writes_nothing(uninterrupted, capsys):
    _, workdir = uninterrupted
    contents = lambda: {
        f: f.read_bytes() for f in workdir.rglob("*") if f.is_file() and f.name != ".lock"
    }
    before = contents()
    train_and_evaluate(small_config(**EVERYTHING), workdir)
    assert contents() == before
    assert "already finished" in capsys.readouterr().out


def test_another_config_is_refused_before_any_work(uninterrupted):
    _, workdir = uninterrupted
    with pytest.raises(UserError, match="train.batch_size=20"):
        train_and_evaluate(small_config(**EVERYTHING | {"train__batch_size": 20}), workdir)


@pytest.mark.slow
def test_more_epochs_with_a_constant_schedule_equal_a_longer_run(tmp_path):
    config = lambda epochs: small_config(optim__schedule="constant", train__epochs=epochs)
    train_and_evaluate(config(1), tmp_path / "longer")
    longer = train_and_evaluate(config(2), tmp_path / "longer")
    assert_same(longer, train_and_evaluate(config(2), tmp_path / "whole"))
    assert json.loads((tmp_path / "longer/results.json").read_text())["epochs"] == 2


@pytest.fixture
def finished(uninterrupted, tmp_path):
    """A copy of the finished run, to be changed; and what it holds, report and times aside."""
    workdir = shutil.copytree(uninterrupted[1], tmp_path / "run")
    return workdir, outcome(workdir), (workdir / "config.json").read_bytes()


def looks(workdir):
    return len(read_lines(workdir / "test_evaluations.jsonl"))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BROKEN_REPORTS = {
    "missing": lambda workdir: (workdir / "report.html").unlink(),
    "empty": lambda workdir: (workdir / "report.html").write_bytes(b""),
    "torn": lambda workdir: cut(workdir / "report.html"),
    "of other results": lambda workdir: edit(workdir / "results.json", seconds=1.0),
    "a link": lambda workdir: (
        (workdir / "report.html").rename(workdir.parent / "elsewhere"),
        cut(workdir.parent / "elsewhere"),
        (workdir / "report.html").symlink_to(workdir.parent / "elsewhere"),
    ),
}


@pytest.mark.parametrize("how", BROKEN_REPORTS)
def test_a_broken_report_is_written_again_without_another_look_at_the_test_split(finished, how):
    workdir, before, _ = finished
    BROKEN_REPORTS[how](workdir)
    train_and_evaluate(small_config(**EVERYTHING), workdir)
    page = (workdir / "report.html").read_bytes()
    digest = hashlib.sha256((workdir / "results.json").read_bytes()).hexdigest()
    assert page.startswith(b"<!doctype html>") and digest.encode() in page[-99:]
    assert outcome(workdir) == before and looks(workdir) == 1


BROKEN_RESULTS = {
    "missing": lambda workdir: (workdir / "results.json").unlink(),
    "empty": lambda workdir: (workdir / "results.json").write_bytes(b""),
    "torn": lambda workdir: cut(workdir / "results.json"),
    "no object": lambda workdir: (workdir / "results.json").write_text("[1]"),
    "of an earlier step": lambda workdir: edit(workdir / "results.json", step=5),
    "of fewer epochs": lambda workdir: edit(workdir / "results.json", epochs=1),
    "of another config": lambda workdir: edit(workdir / "results.json", config={"seed": 1}),
    "with a value of another type": lambda workdir: edit(workdir / "results.json", macro=[]),
    "without predictions": lambda workdir: (workdir / "predictions.npz").unlink(),
    "with torn predictions": lambda workdir: cut(workdir / "predictions.npz"),
}


@pytest.mark.parametrize("how", BROKEN_RESULTS)
def test_a_run_without_results_of_its_last_step_is_evaluated_again(finished, how):
    workdir, before, _ = finished
    BROKEN_RESULTS[how](workdir)
    train_and_evaluate(small_config(**EVERYTHING), workdir)
    assert outcome(workdir) == before and looks(workdir) == 2
    with np.load(workdir / "predictions.npz", allow_pickle=False) as saved:
        assert saved["logits"].shape == (50, 10)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\0" * 99, b"[]", b"[" * 5000, b"{}"])
def test_a_broken_config_is_made_again_and_compared_all_the_same(finished, content):
    workdir, before, config = finished
    path = workdir / "config.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="holds a run of another config: seed=1"):
        train_and_evaluate(small_config(**EVERYTHING, seed=1), workdir)
    train_and_evaluate(small_config(**EVERYTHING), workdir)
    assert path.read_bytes() == config and outcome(workdir) == before and looks(workdir) == 1


def test_the_first_checkpoint_s_meta_may_be_damaged_for_the_config_to_be_compared(finished):
    workdir, before, _ = finished
    cut(workdir / "checkpoints/10/meta/metadata")
    (workdir / "config.json").unlink()
    train_and_evaluate(small_config(**EVERYTHING), workdir)
    assert outcome(workdir) == before and (workdir / "checkpoints/damaged-10").exists()


@pytest.mark.parametrize("name", ["report.html", "results.json", "predictions.npz", "config.json"])
def test_a_disk_that_fills_at_the_end_is_exit_4_and_the_same_command_finishes(
    finished, monkeypatch, name
):
    workdir, before, _ = finished
    (workdir / name).unlink()
    replace = Path.replace

    def full(self, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left"):
        patch.setattr(Path, "replace", full)
        train_and_evaluate(small_config(**EVERYTHING), workdir)
    train_and_evaluate(small_config(**EVERYTHING), workdir)
    assert outcome(workdir) == before and (workdir / name).exists()


def test_results_that_cannot_be_read_now_are_left_alone(finished, monkeypatch):
    workdir, before, _ = finished
    read_bytes = Path.read_bytes

    def fail(self):
        if self.name == "results.json":
            raise OSError(errno.EIO, "Input/output error")
        return read_bytes(self)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="Input/output"):
        patch.setattr(Path, "read_bytes", fail)
        train_and_evaluate(small_config(**EVERYTHING), workdir)
    assert outcome(workdir) == before and looks(workdir) == 1


GARBAGE = [
    b"\0" * 300,
    b"\0\xff\xfe\n" * 3,
    b"PK\x03\x04\n\n\r\n\x80",
    b'[1]\n"step"\n3\nnull\n{}\n{"step": 1}\n{"step": "1", "split": "train", "epoch": 1}\n',
    b'{"step": 2, "split": "validation", "epoch": 0.4, "loss": "low"}\n' + b"[" * 3000,
]


def test_garbage_among_the_rows_costs_those_lines_alone(uninterrupted, tmp_path, caplog):
    garbage = b"\n".join(GARBAGE)
    config = small_config(**EVERYTHING)
    train_and_evaluate(config, tmp_path, until_epoch=1)
    rows = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(rows[:-5] + garbage + b"\n" + rows)
    (tmp_path / "test_evaluations.jsonl").write_bytes(garbage)
    train_and_evaluate(config, tmp_path)
    assert "metrics.jsonl are broken, and left out" in caplog.text
    rows, results = outcome(uninterrupted[1])
    assert outcome(tmp_path) == (rows[:1] + rows, results)  # its first row stood there twice
    assert looks(tmp_path) > 1
    page = (tmp_path / "report.html").read_text()
    assert f"evaluated {looks(tmp_path)} times" in page


def test_links_in_a_workdir_lead_no_write_elsewhere(finished):
    workdir, before, _ = finished
    (outside := workdir.parent / "outside").mkdir()
    cut(workdir / "checkpoints/10/state/manifest.ocdbt")  # so that it trains on
    for path in (path for path in workdir.iterdir() if path.is_file()):
        path.rename(outside / path.name)
        path.symlink_to(outside / path.name)
    contents = {path: path.read_bytes() for path in outside.iterdir()}
    for name, error in ((".lock", UserError), ("test_evaluations.jsonl", CheckpointError)):
        with pytest.raises(error, match="Too many levels of symbolic links"):
            (workdir / "results.json").unlink(missing_ok=True)
            train_and_evaluate(small_config(**EVERYTHING), workdir)
        (workdir / name).unlink()
    train_and_evaluate(small_config(**EVERYTHING), workdir)
    assert {path: path.read_bytes() for path in outside.iterdir()} == contents
    assert outcome(workdir) == before
    assert not any((workdir / name).is_symlink() for name in ("report.html", "metrics.jsonl"))


def test_where_the_best_checkpoint_is_damaged_the_results_and_the_report_say_so(tmp_path, capsys):
    config = small_config(eval__checkpoint="best", train__epochs=3)
    train_and_evaluate(config, tmp_path)
    Checkpoints(tmp_path / "checkpoints").record(10, {"top1": 1.0})
    cut(tmp_path / "checkpoints/10/state/manifest.ocdbt")
    (tmp_path / "results.json").unlink()
    train_and_evaluate(config, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["step"], results["in_place_of"]) == (15, 10)
    page = " ".join((tmp_path / "report.html").read_text().split())
    assert 'of step <bdi class="name">10</bdi>, is damaged or gone' in page
    capsys.readouterr()
    train_and_evaluate(config, tmp_path)
    assert "already finished" in capsys.readouterr().out


def test_the_best_checkpoint_is_evaluated_when_asked_for(tmp_path):
    # So high a learning rate that the last epoch is not the best.
    config = small_config(
        optim__learning_rate=0.3, optim__schedule="constant", optim__ema_decay=0.0,
        eval__checkpoint="best", train__epochs=4,
    )  # fmt: skip
    train_and_evaluate(config, tmp_path)
    rows = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["split"] == "validation"]
    results = json.loads((tmp_path / "results.json").read_text())
    best = max(rows, key=lambda row: row["top1"])
    assert results["checkpoint"] == "best"
    assert rows[[r["step"] for r in rows].index(results["step"])]["top1"] == best["top1"]


def test_a_run_without_validation_says_so(tmp_path, capsys):
    train_and_evaluate(small_config(data__validation="", train__epochs=1), tmp_path)
    assert "validation: none" in capsys.readouterr().out
    assert {r["split"] for r in read_metrics(tmp_path / "metrics.jsonl")} == {"train"}
    assert json.loads((tmp_path / "results.json").read_text())["calibration"]["temperature"] is None


EXPLOSIVE = {
    "optim__learning_rate": 1e30,
    "optim__warmup_epochs": 0.0,
    "optim__schedule": "constant",
    "optim__name": "sgd",
}


def test_divergence_names_the_step_and_the_examples_and_saves_nothing_past_it(tmp_path):
    config = small_config(**EXPLOSIVE)
    with pytest.raises(
        DivergedError, match=r"not finite in step \d+, with examples train:\d+"
    ) as e:
        train_and_evaluate(config, tmp_path)
    assert e.value.exit_code == 3
    told = json.loads((tmp_path / "diverged.json").read_text())
    assert len(told["ids"]) == 40
    assert all(step < told["step"] for step in Checkpoints(tmp_path / "checkpoints").steps())
    assert all(row["step"] < told["step"] for row in read_metrics(tmp_path / "metrics.jsonl"))
    assert_events_are_whole(tmp_path)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_bad_steps_can_be_allowed(tmp_path, monkeypatch):
    def poison(rng, images, labels, probability):
        """Spoils all images with the given probability."""
        return jnp.where(jax.random.uniform(rng) < probability, jnp.nan, images), labels

    monkeypatch.setitem(AUGMENTATIONS, "poison", poison)
    config = lambda allowed: small_config(augment__poison=0.4, train__max_bad_steps=allowed)
    with pytest.raises(DivergedError):
        train_and_evaluate(config(1), tmp_path / "one")
    state = train_and_evaluate(config(10), tmp_path / "ten")
    bad = Checkpoints(tmp_path / "ten/checkpoints").read_meta()["bad_steps"]
    assert 1 < len(bad) < 10 and state.step == 10
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_a_batch_larger_than_the_split_is_refused(tmp_path):
    with pytest.raises(UserError, match="more than the 200 examples"):
        train_and_evaluate(small_config(train__batch_size=204), tmp_path)


def test_changed_data_is_refused(uninterrupted, tmp_path, monkeypatch):
    train_and_evaluate(small_config(train__epochs=1), tmp_path)
    opened = SOURCES["digits"]

    def fewer(**options):
        sources = opened(**options)
        sources["train"].class_names = tuple("abcdefghij")
        return sources

    monkeypatch.setitem(SOURCES, "digits", fewer)
    with pytest.raises(UserError, match="the data changed"):
        train_and_evaluate(small_config(train__epochs=1), tmp_path)


def test_the_logged_rate_leaves_out_validation_but_no_step(tmp_path, monkeypatch):
    """By the clock here a step takes a second, validation 100, everything else next to nothing."""
    now = [0.0]

    def clock():
        now[0] += 1e-9
        return now[0]

    monkeypatch.setattr(time, "perf_counter", clock)
    wait, validate = MetricWindow.wait, train.validate

    def step(self, *, ahead):
        now[0] += 1
        wait(self, ahead=ahead)

    def slowly(*arguments):
        now[0] += 100
        return validate(*arguments)

    monkeypatch.setattr(MetricWindow, "wait", step)
    monkeypatch.setattr(train, "validate", slowly)
    # Validation falls within the log windows, and a window begins in each of the two sessions.
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 7)
        train_and_evaluate(small_config(), tmp_path)
    train_and_evaluate(small_config(), tmp_path)
    rows = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["split"] == "train"]
    assert [row["images_per_second"] for row in rows] == [40] * len(rows)


def test_a_callback_stops_a_run_that_a_later_call_finishes(uninterrupted, tmp_path):
    rows = []

    def until_validated(row):
        rows.append(row)
        return row["split"] == "validation"

    config = small_config(**EVERYTHING)
    state = train_and_evaluate(config, tmp_path, callback=until_validated)
    assert state.step == 5 and without_times(rows) == outcome(uninterrupted[1])[0][:2]
    assert not (tmp_path / "results.json").exists()
    assert_same(train_and_evaluate(config, tmp_path), uninterrupted[0])
    assert outcome(tmp_path) == outcome(uninterrupted[1])


def test_trained_epoch_by_epoch_and_tested_later_a_run_is_the_same(uninterrupted, tmp_path):
    config = small_config(**EVERYTHING)
    for epoch in (0, 1, 1, 2, 3):
        state = train_and_evaluate(config, tmp_path, until_epoch=epoch, test=False)
        assert state.step == 5 * min(epoch, 2)
    assert not (tmp_path / "test_evaluations.jsonl").exists()
    assert_same(train_and_evaluate(config, tmp_path), uninterrupted[0])
    assert outcome(tmp_path) == outcome(uninterrupted[1])


def test_a_sweep_s_folder_is_no_run_s(tmp_path):
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match="holds a sweep, not a run: use another --workdir"):
        train_and_evaluate(small_config(), tmp_path)
