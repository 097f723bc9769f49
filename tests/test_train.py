"""Whole runs: a stopped and resumed run is the run that was never stopped."""

import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgcls import train
from imgcls.augment import AUGMENTATIONS
from imgcls.config import flatten
from imgcls.data.sources import SOURCES
from imgcls.errors import DivergedError, Stopped, UserError
from imgcls.experiment import Experiment, load_config
from imgcls.run import signals
from imgcls.run.checkpoint import Checkpoints
from imgcls.run.logs import MetricWindow, read_metrics
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


def test_more_epochs_with_a_constant_schedule_equal_a_longer_run(tmp_path):
    config = lambda epochs: small_config(optim__schedule="constant", train__epochs=epochs)
    train_and_evaluate(config(1), tmp_path / "longer")
    longer = train_and_evaluate(config(2), tmp_path / "longer")
    assert_same(longer, train_and_evaluate(config(2), tmp_path / "whole"))
    assert json.loads((tmp_path / "longer/results.json").read_text())["epochs"] == 2


def test_killed_before_its_report_was_written_a_run_is_evaluated_again(tmp_path):
    config = small_config(train__epochs=1)
    train_and_evaluate(config, tmp_path)
    report = tmp_path / "report.html"
    page = report.read_bytes()
    report.unlink()
    (tmp_path / "results.json").write_text("{}")
    train_and_evaluate(config, tmp_path)
    assert len(report.read_bytes()) > len(page) / 2
    assert outcome(tmp_path)[1]["epochs"] == 1


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
    for epoch in (1, 1, 2, 3):
        state = train_and_evaluate(config, tmp_path, until_epoch=epoch, test=False)
        assert state.step == 5 * min(epoch, 2)
    assert not (tmp_path / "test_evaluations.jsonl").exists()
    assert_same(train_and_evaluate(config, tmp_path), uninterrupted[0])
    assert outcome(tmp_path) == outcome(uninterrupted[1])
