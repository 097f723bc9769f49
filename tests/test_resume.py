"""What a resumed run is given: the same examples in the same order, on what it began with."""

import ctypes
import dataclasses
import json
import threading
from functools import partial

import jax
import numpy as np
import pytest

from imgcls import cpu, experiment
from imgcls.config import flatten, left_open
from imgcls.cpu import onednn
from imgcls.cpu.conv import conv_general_dilated, why_unavailable
from imgcls.errors import CheckpointError, Stopped, UserError
from imgcls.experiment import Experiment, load_config
from imgcls.inference.classifier import load
from imgcls.run import machine, processes
from imgcls.run.logs import MetricWriter, read_metrics
from imgcls.train import train_and_evaluate
from tests.helpers import read_events, small_config
from tests.test_train import EVERYTHING, stop_after


def session(workdir, config, until=None, **options):
    """One start of a run, stopped after step `until`."""
    with pytest.MonkeyPatch.context() as patch:
        if until is None:
            return train_and_evaluate(config, workdir, **options)
        stop_after(patch, until)
        with pytest.raises(Stopped, match=f"step {until} is saved"):
            train_and_evaluate(config, workdir, **options)


@pytest.fixture
def without_computing(monkeypatch):
    """In place of the compiled steps: the list of what they were given, (step, images)."""
    given = []

    def train_step(state, batch, rng):
        given.append((int(state.step), np.asarray(batch["image"]).tobytes()))
        metrics = {"loss": 0.0, "top1": 0.0, "count": 40.0, "bad": 0.0}
        return state.replace(step=state.step + 1), metrics

    eval_step = lambda state, batch: {"loss": 0.0, "top1": 0.0, "count": 1.0}
    monkeypatch.setattr(Experiment, "compile_train_step", lambda *_, **__: train_step)
    monkeypatch.setattr(Experiment, "compile_eval_step", lambda *_: eval_step)
    return given


def test_stopped_at_every_step_a_run_takes_the_same_examples_in_order(without_computing, tmp_path):
    given, config = without_computing, small_config()
    session(tmp_path / "whole", config, test=False)
    whole = given.copy()
    assert [step for step, _ in whole] == list(range(10)) and len(set(whole)) == 10
    given.clear()
    for step in range(1, 10):
        session(tmp_path / "stopped", config, until=step)
        assert given == whole[:step]
    session(tmp_path / "stopped", config, test=False)
    assert given == whole


OPEN = {"data__mean": (), "data__std": (), "model__widths": (), "train__epochs": 0}
OPEN |= {"train__steps": 11, "train__batch_size": 0, "train__validate_every_epochs": 0}


def test_what_the_pictures_decided_is_kept_however_often_a_run_is_stopped(
    without_computing, tmp_path, capsys
):
    config = small_config(**OPEN)  # 3 steps per epoch
    session(tmp_path, config, until=2)
    decided = load_config(tmp_path)
    assert "chosen by 200 training pictures" in capsys.readouterr().out
    assert decided.train.epochs == 4 and not left_open(decided)
    session(tmp_path, config, until=7)
    assert "chosen" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"train.epochs=3 .was 4"):
        train_and_evaluate(small_config(**OPEN | {"train__epochs": 3}), tmp_path)
    session(tmp_path, decided, test=False)
    assert flatten(load_config(tmp_path)) == flatten(decided)
    assert len(without_computing) == 12


@pytest.fixture
def top1(without_computing, monkeypatch):
    """The scores of the validations of `without_computing`, by their epoch from 1 on."""
    scores = {}

    def eval_step(state, batch):
        return {"loss": 1.0, "top1": scores[int(state.step) // 5], "count": 1.0}

    monkeypatch.setattr(Experiment, "compile_eval_step", lambda *_: eval_step)
    return scores


def test_patience_ends_a_run_at_the_same_step_however_it_was_stopped(
    without_computing, top1, tmp_path, capsys
):
    top1 |= dict(enumerate([0.2, 0.5, 0.4, 0.5, 0.3, 0.9, 0.9, 0.9], 1))
    config = small_config(train__epochs=8, train__patience=3, optim__ema_decay=0.0)
    session(tmp_path / "whole", config, test=False)
    assert len(without_computing) == 25, "the equal score of epoch 4 is no better one"
    assert "stopped early: no better validation since that of step 10" in capsys.readouterr().out
    rows = lambda name: [
        (row["split"], row["step"]) for row in read_metrics(tmp_path / name / "metrics.jsonl")
    ]
    for step in (10, 20, 24):
        session(tmp_path / "stopped", config, until=step)
    for _ in range(2):  # the second finds it finished
        session(tmp_path / "stopped", config, test=False)
    assert len(without_computing) == 50 and rows("stopped") == rows("whole")


def test_a_run_that_patience_ended_is_finished(without_computing, top1, tmp_path, capsys):
    top1 |= {1: 0.5, 2: 0.4}
    config = small_config(
        train__patience=1, optim__ema_decay=0.0, train__epochs=8, eval__checkpoint="best"
    )
    train_and_evaluate(config, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["stopped_early"] == {"step": 10, "best_step": 5} and results["step"] == 5
    assert load(tmp_path).meta["stopped_early"] == results["stopped_early"]
    capsys.readouterr()
    train_and_evaluate(config, tmp_path)
    assert "already finished" in capsys.readouterr().out and len(without_computing) == 10


def test_short_epochs_have_four_lines_where_no_number_is_given(without_computing, tmp_path, capsys):
    # 12 steps per epoch
    config = small_config(train__log_every_steps=0, train__batch_size=16, train__steps=500)
    session(tmp_path, config, test=False)
    assert "config.train.epochs=2 makes 24 steps, not 500" in capsys.readouterr().out
    rows = [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["split"] == "train"]
    assert rows == list(range(3, 25, 3))


def test_a_run_goes_on_with_the_data_that_it_began_with_or_not_at_all(without_computing, tmp_path):
    given, config = without_computing, small_config()
    names = ("train", "validation", "test")
    splits = dict(zip(names, experiment.open_splits(config, *names)))
    session(tmp_path, config, until=3, splits=splits)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for name in names:
        labels = splits[name].labels.copy()
        labels[[4, 9]] = labels[[9, 4]]  # digits of two classes
        other = {name: dataclasses.replace(splits[name], labels=labels, digests=None)}
        if name == "test":  # which is not looked at before it is needed
            without = {"train": splits["train"], "validation": splits["validation"]}
            session(tmp_path, config, until=5, splits=without, test=False)
        given.clear()
        with pytest.raises(UserError, match=f"2 of .* {name} pictures changed, first "):
            train_and_evaluate(config, tmp_path, splits=splits | other)
        assert not given
    (fewer,) = experiment.open_splits(small_config(data__train="train[:199]"), "train")
    with pytest.raises(UserError, match="1 of 200 train pictures are gone"):
        train_and_evaluate(config, tmp_path, splits=splits | {"train": fewer})
    # How many may be unreadable does not matter where the examples are the same.
    session(tmp_path, small_config(data__skip_bad=7), until=7, splits=splits)
    assert len((tmp_path / "metrics.jsonl").read_bytes()) > len(before)


@pytest.mark.slow
def test_on_two_devices_then_one_then_two_only_the_last_bits_differ(tmp_path, monkeypatch):
    given, train_batch = [], Experiment.train_batch

    def record(self, step):
        batch = train_batch(self, step)
        assert len(batch["image"].sharding.device_set) == devices
        given.append(np.asarray(batch["image"]).tobytes())
        return batch

    monkeypatch.setattr(Experiment, "train_batch", record)
    quick_to_compile = {
        "train__accumulate_steps": 1,
        "train__small_epochs": 0.0,
        "augment__rotate_degrees": 0.0,
    }

    def on(number, workdir, until=None):
        nonlocal devices
        devices = number
        mesh = jax.sharding.Mesh(jax.devices()[:number], ("data",))
        for module in (experiment, processes):
            monkeypatch.setattr(module, "make_mesh", lambda: mesh)
        start = len(given)
        session(workdir, small_config(**EVERYTHING | quick_to_compile), until)
        return given[start + 1 :]  # the first batch is only compiled for

    devices = 2
    whole = on(2, tmp_path / "whole")
    changing = [batch for n, until in ((2, 3), (1, 7), (2, None))
                for batch in on(n, tmp_path / "changing", until)]  # fmt: skip
    assert changing == whole and len(whole) == 10
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "changing")]
    assert [(r["step"], r["split"]) for r in rows[0]] == [(r["step"], r["split"]) for r in rows[1]]
    losses = [[row["loss"] for row in r] for r in rows]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_run_that_goes_on_elsewhere_says_so_once(
    without_computing, tmp_path, monkeypatch, caplog
):
    with monkeypatch.context() as patch:
        there = machine.reproducibility_facts() | {"devices": "4 x cpu another CPU"}
        patch.setattr(machine, "reproducibility_facts", lambda: there)
        session(tmp_path, small_config(), until=2)
    session(tmp_path, small_config(), until=3)
    (warning,) = [r.getMessage() for r in caplog.records if "last bits" in r.getMessage()]
    assert "devices was 4 x cpu another CPU, is 4 x cpu " in warning
    caplog.clear()
    session(tmp_path, small_config(), until=4)
    assert "last bits" not in caplog.text


def plain_experiment():
    return Experiment(small_config(model__cpu_kernels="off"), class_names=("a", "b"))


@pytest.mark.parametrize(
    "changed",
    [
        {"jaxlib": "0.1"},
        {"optax": "0.1"},
        {"git_commit": "f" * 40},
        {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"},
        {"cpu_cores": 10**6},
        {"devices": "8 x tpu TPU v5"},
    ],
)
def test_what_decides_the_bits_is_warned_of_where_it_differs(changed, caplog):
    bits = plain_experiment().reproducibility_facts()
    machine.check_reproducible(json.loads(json.dumps(bits)), bits)
    assert not caplog.records
    machine.check_reproducible(bits | changed, bits)
    (key, value), *_ = changed.items()
    (record,) = caplog.records
    assert f"{key} was {value}, is {bits[key]}" in record.message


def test_another_generator_of_random_numbers_is_refused():
    bits = plain_experiment().reproducibility_facts()
    with pytest.raises(CheckpointError, match="rbg.*JAX_DEFAULT_PRNG_IMPL=rbg"):
        machine.check_reproducible(bits | {"prng": "rbg"}, bits)


@pytest.mark.skipif(why_unavailable("float32") is not None, reason="no oneDNN here")
def test_the_number_of_openmp_threads_is_that_of_the_first_session(request):
    request.addfinalizer(partial(cpu.use_threads, cpu.identity()["openmp_threads"]))
    exp = plain_experiment()
    exp.ops = {"conv": conv_general_dilated}
    others = exp.reproducibility_facts()["openmp_threads"] + 1
    assert exp.reproducibility_facts({"openmp_threads": others})["openmp_threads"] == others
    conv = onednn.Convolution(
        (1, 4, 4, 8), (1, 1, 8, 8), (1, 4, 4, 8), (1, 1), ((0, 0), (0, 0)), "float32"
    )
    run, used = onednn.build("forward", conv), []
    arrays = [np.zeros(shape, np.float32) for shape in (conv.x, conv.w, conv.y)]

    def elsewhere():  # XLA calls from threads of its own
        run(*(array.ctypes.data for array in arrays))
        used.append(ctypes.CDLL(onednn.LIBRARY).omp_get_max_threads())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert used == [others]


def test_a_torn_line_and_lines_past_the_restored_step_are_cut(tmp_path):
    rows = [{"step": s, "epoch": s / 5, "split": "train", "loss": 1.0} for s in (3, 5, 6)]
    rows.insert(2, rows[1] | {"split": "validation"})  # step 5 was saved before it was validated
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "spl')
    writer = MetricWriter(tmp_path, start_step=5, validated_step=3)
    writer.write(rows[3] | {"loss": 2.0})
    writer.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        *rows[:2],
        rows[3] | {"loss": 2.0},
    ]


def test_events_on_the_disk_say_at_once_what_was_logged_and_from_which_step_on(tmp_path):
    from tensorboardX.proto.event_pb2 import SessionLog

    writer = MetricWriter(tmp_path, start_step=5, validated_step=0)
    writer.write({"step": 7, "split": "train", "loss": 0.5})
    writer.image("train/augmented", np.zeros((4, 4, 3), np.uint8), 0)
    version, start, loss, image = read_events(tmp_path)
    writer.close()
    assert version.file_version == "brain.Event:2"
    assert start.step == 6 and start.session_log.status == SessionLog.START
    assert (loss.step, loss.summary.value[0].tag) == (7, "train/loss")
    assert loss.summary.value[0].simple_value == 0.5
    assert image.summary.value[0].image.height == 4
