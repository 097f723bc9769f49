import json
import os
import random
import signal
import time

import numpy as np
import pytest

from imgcls import sweep
from imgcls.errors import CheckpointError, UserError
from imgcls.run.checkpoint import Checkpoints
from imgcls.run.logs import read_metrics
from imgcls.tuning import summary
from imgcls.tuning.page import write_page
from imgcls.tuning.plan import Job, Sweep
from imgcls.tuning.space import canonical
from imgcls.tuning.sweep import _prepare, start
from imgcls.tuning.worker import AtWork, Child, check, fail
from tests.commands import Command, run_fresh
from tests.evaluation.browser import CHROMIUM, Browser
from tests.helpers import as_users, flags_of, small_config
from tests.test_train import without_times

RATES = {"optim.learning_rate": ("log", 0.001, 0.1)}


def plan(workdir, space=RATES, **options) -> Sweep:
    config = small_config(train__epochs=options.pop("epochs", 8))
    start(workdir, config, canonical(space), **options)
    return Sweep(workdir)


def write(sweep: Sweep):
    results = summary.write(sweep)
    write_page(sweep.workdir, results)
    return results


def pretend(sweep: Sweep, job: Job, top1: float | None, loss: float = 1.0) -> None:
    """Leaves what a job would leave. `top1` None: it failed."""
    folder = sweep.folder(job.run)
    folder.mkdir(parents=True, exist_ok=True)
    if top1 is None:
        (folder / "failed.json").write_text(json.dumps({"exit_code": 3, "why": "it diverged"}))
    elif job.epoch is None:
        (folder / "results.json").write_text(json.dumps({"top1": top1, "loss": loss}))
    else:
        row = {"step": 5 * job.epoch, "epoch": float(job.epoch), "split": "validation"}
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row | {"loss": loss, "top1": top1}) + "\n")


def go_on(sweep: Sweep, result, seed: int = 0) -> list[list[Job]]:
    """Does the jobs in a random order, each found as a worker would find it."""
    done, order = [], random.Random(seed)
    while stage := sweep.next(set())[0]:
        done.append(stage)
        for job in order.sample(stage, len(stage)):
            pretend(sweep, job, *result(job))
        assert Sweep(sweep.workdir).next(set()) == sweep.next(set())  # another worker's view
    return done


def by_rate(sweep):
    """The nearer the learning rate is to 0.01, the better."""

    def result(job):
        rate = sweep.config_of(job.run).optim.learning_rate
        return [0.9 - 0.1 * abs(np.log10(rate / 0.01))]

    return result


def test_halving_goes_on_with_the_best_whatever_the_order_in_which_trials_end(tmp_path):
    ran = []
    for seed in range(3):
        s = plan(tmp_path / str(seed), trials=9, rungs=(2, 4), finalists=2, seeds=3)
        ran.append(go_on(s, by_rate(s), seed))
    assert ran[0] == ran[1] == ran[2]
    first, second, third, seeds = ran[0]
    assert [job.epoch for job in first] == [2] * 9
    assert [{job.epoch for job in stage} for stage in (second, third, seeds)] == [{4}, {8}, {8}]
    value = lambda job: by_rate(s)(job)[0]
    best = sorted((job.run for job in first), key=lambda run: -value(Job(run, 2)))
    assert {*best[:5]} <= {job.run for job in second} and "trials/000" in {j.run for j in third}
    # The finalists' seeds are not the one that chose them.
    assert {s.config_of(job.run).seed for job in seeds} == {1, 2, 3}


def test_of_equals_the_lower_loss_goes_on_then_the_first(tmp_path):
    s = plan(tmp_path, trials=5, rungs=(2,), keep=0.4, finalists=1, seeds=1)
    losses = {"trials/003": 0.5}
    stages = go_on(s, lambda job: (0.9, losses.get(job.run, 1.0)))
    assert {job.run for job in stages[1]} == {"trials/000", "trials/003"}
    best = write(s)["finalists"][0]
    assert best["trial"] == 0  # with fresh seeds they are equal


def test_failed_trials_are_results_and_not_the_end(tmp_path):
    s = plan(tmp_path, trials=8, rungs=(2,), finalists=2, seeds=3)
    result = lambda job: [None] if s.config_of(job.run).optim.learning_rate > 0.02 else [0.8]
    go_on(s, result)
    results = write(s)
    failed = [row for row in results["trials"] if row["state"] == "failed"]
    assert failed and all(row["point"]["optim.learning_rate"] > 0.02 for row in failed)
    assert failed[0]["why"] == "it diverged"
    told = f"{len(failed)} of 8 trials failed, all at optim.learning_rate of at least"
    assert any(told in sentence for sentence in results["findings"])
    assert "it diverged" in (tmp_path / "sweep.html").read_text()


@pytest.mark.parametrize("rungs", [(), (2, 4)])
def test_where_all_fail_it_is_said(tmp_path, rungs):
    s = plan(tmp_path, trials=3, seeds=2, rungs=rungs)
    go_on(s, lambda job: [None])
    assert write(s)["findings"] == ["No trial came to its end: see why in results.json."]
    assert (tmp_path / "sweep.html").exists()


def test_the_configs_own_value_may_be_outside_of_the_range_and_best(tmp_path):
    s = plan(tmp_path, {"optim.clip_norm": ("log", 0.1, 10.0)}, trials=3, seeds=1)
    go_on(s, lambda job: [0.9 if "000" in job.run else 0.8])
    said = " ".join(summary.write(s)["findings"])
    assert "optim.clip_norm, 0.0, is at the lower edge of its range" in said


@pytest.mark.parametrize("loss", [None, 1e30])  # as JSON has what is not finite, and huge
def test_validation_may_go_wrong_without_an_end_to_training(tmp_path, loss):
    s = plan(tmp_path, trials=3, finalists=1, seeds=1)
    go_on(s, lambda job: (0.9 if "000" in job.run else 0.1, loss))
    results = write(s)
    assert [row["loss"] for row in results["trials"]] == [loss] * 3
    assert results["finalists"][0]["trial"] == 0


def test_the_findings_say_what_to_do_next(tmp_path):
    s = plan(tmp_path, trials=12, finalists=3, seeds=3)
    noise = lambda job: 0.001 * int(job.run[-1]) if job.run.startswith("seeds") else 0
    go_on(s, lambda job: [0.5 + s.config_of(job.run).optim.learning_rate + noise(job)])
    said = " ".join(write(s)["findings"])
    assert "is at the upper edge of its range" in said
    s = plan(tmp_path / "flat", trials=12, finalists=3, seeds=3)
    chance = lambda job: 0.01 * int(job.run[-1]) if "-" in job.run else 0.0
    alike = lambda job: [0.9 + chance(job) + 0.001 * ("/001" in job.run)]
    go_on(s, alike)
    assert "The config as it is, trial 0, is as good." in write(s)["findings"]


def test_tables_for_a_paper(tmp_path):
    s = plan(tmp_path, trials=3, finalists=2, seeds=3)
    go_on(s, lambda job: [0.9 + 0.01 * int(job.run[-1])])
    write(s)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert "optim.learning_rate" in lines[0] and len(lines) == 2 + len(s.alive)
    # Seeds 1, 2 and 3: 91, 92 and 93; Student's factor is 4.303 at two degrees of freedom.
    assert "92.00" in lines[2] and "89.52 to 94.48" in lines[2]
    table = (tmp_path / "table.tex").read_text()
    assert r"optim.learning\_rate" in table and table.count(r"\\") == len(lines) - 1


def test_test_is_for_the_winner_alone(tmp_path):
    s = plan(tmp_path, trials=4, finalists=2, seeds=2, test=True)
    *_, last = go_on(s, by_rate(s))
    winner = write(s)["test"]["trial"]
    assert last == [Job(f"seeds/{winner:03d}-{seed}", None) for seed in (1, 2)]
    s = plan(tmp_path / "without", trials=4, finalists=2, seeds=2)
    assert all(job.epoch for stage in go_on(s, by_rate(s)) for job in stage)


def test_without_a_space_the_config_is_repeated(tmp_path):
    s = plan(tmp_path, {}, seeds=4)
    stages = go_on(s, lambda job: [0.9])
    assert stages == [[Job(f"seeds/000-{seed}", 8) for seed in range(4)]]
    assert "mean of 4 seeds" in write(s)["findings"][0]


def test_more_trials_extend_a_sweep(tmp_path):
    s = plan(tmp_path, trials=6, rungs=(2,), seeds=1)
    go_on(s, by_rate(s))
    before = s.points
    s = plan(tmp_path, trials=10, rungs=(2,), seeds=1)
    assert s.points[:6] == before
    stages = go_on(s, by_rate(s))
    assert {job.run for job in stages[0]} == {f"trials/{i:03d}" for i in range(10)}
    with pytest.raises(UserError, match="--trials must be at least"):
        plan(tmp_path, trials=5, rungs=(2,), seeds=1)


@pytest.mark.parametrize(
    "other, told",
    [
        ({"space": {"optim.learning_rate": ("log", 0.01, 0.1)}}, "space.optim.learning_rate.log"),
        ({"rungs": (4,)}, r"rungs=\[4\] \(was \[2\]\)"),
        ({"seed": 1}, "seed=1"),
        ({"epochs": 6}, "config.train.epochs=6"),
    ],
)
def test_another_sweep_in_the_same_directory_is_refused_with_what_differs(tmp_path, other, told):
    plan(tmp_path, rungs=(2,))
    with pytest.raises(UserError, match=told):
        plan(tmp_path, **{"rungs": (2,)} | other)
    plan(tmp_path, rungs=(2,), test=True)  # what may change


@pytest.mark.parametrize(
    "options, told",
    [
        ({"rungs": (8,)}, "under config.train.epochs=8"),
        ({"rungs": (4, 2)}, "must rise"),
        ({"space": {"optim.learning_rate": [-1.0, -2.0]}}, "must be a number over 0"),
        ({"space": {"optim.lr": [0.1]}}, "optim.lr is not a key"),
        ({"seeds": 0}, "--seeds=0 must be at least 1"),
        ({"keep": float("nan")}, "--keep=nan must be from 0 to 1"),
        ({"search": "grid"}, "--search=grid must be halton or tpe"),
        ({"seeds": 2**63}, "must be lower, for --seeds="),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(tmp_path, options, told):
    with pytest.raises(UserError, match=told):
        plan(tmp_path, **options)
    assert not (tmp_path / "sweep.json").exists()


def test_tpe_without_optuna_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -r requirements-optuna\.txt"):
        plan(tmp_path, search="tpe")


@pytest.mark.slow
def test_without_a_config_the_other_flags_count(tmp_path):
    plan(tmp_path, trials=3)
    ended = run_fresh("imgcls", "sweep", f"--workdir={tmp_path}", "--trials=2")
    assert ended.returncode == 2 and "--trials must be at least that" in ended.stderr


def test_a_config_without_validation_or_a_workdir_with_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"set config\.data\.validation"):
        start(tmp_path, small_config(data__validation=""), {})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run"):
        plan(tmp_path)


def test_a_learning_rate_that_no_trial_would_use_is_refused(tmp_path):
    frozen = small_config(optim__backbone_ratio=0.0)
    rate, both = {"optim.learning_rate": [0.1]}, {"optim.backbone_ratio": [0.0, 1.0]}
    for i, space in enumerate((rate, rate | both, {"optim.probe_learning_rate": [0.1]})):
        start(tmp_path / str(i), frozen, canonical(space))
    with pytest.raises(UserError, match=r"no effect, .* vary optim\.probe_learning_rate"):
        _prepare(Sweep(tmp_path / "0"))
    _prepare(Sweep(tmp_path / "1"))
    _prepare(Sweep(tmp_path / "2"))


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\0" * 100, b'{"plan": 1}'])
def test_a_torn_plan_is_an_error_of_one_line(tmp_path, content):
    plan(tmp_path)
    (tmp_path / "sweep.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        plan(tmp_path)
    assert "sweep.json" in str(error.value) and "\n" not in str(error.value)


def test_a_sweep_of_an_earlier_version_goes_on(tmp_path):
    before = plan(tmp_path)
    saved = json.loads((tmp_path / "sweep.json").read_text())
    del saved["config"]["data"]["group"], saved["config"]["train"]["patience"]
    (tmp_path / "sweep.json").write_text(json.dumps(saved))
    assert Sweep(tmp_path).config == plan(tmp_path).config == before.config


def test_values_of_other_types_are_no_plan(tmp_path):
    plan(tmp_path)
    saved = json.loads((tmp_path / "sweep.json").read_text())
    for key in saved:
        (tmp_path / "sweep.json").write_text(json.dumps(saved | {key: None}))
        with pytest.raises(UserError, match="is no plan of a sweep"):
            Sweep(tmp_path)


def test_tpe_is_a_function_of_the_trials_so_far(tmp_path):
    pytest.importorskip("optuna")
    ran = []
    for seed in range(2):
        s = plan(tmp_path / str(seed), trials=20, search="tpe", finalists=1, seeds=1)
        go_on(s, by_rate(s), seed)
        ran.append(s.points)
    assert ran[0] == ran[1] and len(ran[0]) == 20
    rates = [abs(np.log10(p["optim.learning_rate"] / 0.01)) for p in ran[0][1:]]
    assert np.median(rates[9:]) < np.median(rates[:9])  # it has learned where to look


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("trials", [2, pytest.param(200, marks=pytest.mark.slow)])
def test_the_page_in_a_browser(tmp_path, trials):
    space = RATES | {"model": [{"model.name": "mlp"}, {"model.name": "cnn", "model.widths": [[4]]}]}
    s = plan(tmp_path, space, trials=trials, rungs=(2,), seeds=3)
    hopeless = lambda job: s.config_of(job.run).optim.learning_rate > 0.05
    go_on(s, lambda job: [None] if hopeless(job) else by_rate(s)(job))
    write(s)
    with Browser() as browser:
        for width in (390, 1200):
            browser.open(tmp_path / "sweep.html", width=width)
            assert not browser.happened("Log.entryAdded", "Runtime.exceptionThrown")
            requests = browser.happened("Network.requestWillBeSent")
            assert all(r["request"]["url"].startswith(("file:", "data:")) for r in requests)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            rows = "document.querySelectorAll('#trials tbody tr').length"
            assert browser.evaluate(rows) == trials
            shown = "[...document.images].every(i => i.complete && i.naturalWidth > 0)"
            assert browser.evaluate(shown)


# Processes


def wait_for(child: Child) -> Child:
    while not child.poll():
        time.sleep(0.01)
    return child


@pytest.mark.parametrize(
    "error, kind", [(UserError("no"), UserError), (CheckpointError("full"), CheckpointError)]
)
def test_the_error_of_a_child_is_the_parents(tmp_path, error, kind):
    def fails():
        print("some output")
        raise error

    child = wait_for(Child(fails, tmp_path / "log"))
    with pytest.raises(kind, match=f"^{error} .see .*log.$"):
        child.check()
    assert (tmp_path / "log").read_text() == f"some output\nerror: {error}\n"


def test_a_job_whose_process_is_killed_twice_has_failed(tmp_path):
    s = plan(tmp_path, trials=2)
    job = Job("trials/001", 8)
    s.folder(job.run).mkdir(parents=True)
    for death in (1, 2):
        child = wait_for(Child(lambda: os.kill(os.getpid(), signal.SIGKILL), tmp_path / "log"))
        check(s, AtWork(job, child, None))
        assert (s.value(job) is None) == (death == 1)
    assert "signal 9" in json.loads((s.folder(job.run) / "failed.json").read_text())["why"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_job_that_was_asked_to_stop_has_not_failed(tmp_path, number):
    s = plan(tmp_path, trials=2)
    job = Job("trials/001", 8)
    s.folder(job.run).mkdir(parents=True)

    def end():
        signal.signal(number, signal.SIG_DFL)  # shells ignore Ctrl-C for what they do not wait for
        os.kill(os.getpid(), number)

    for _ in range(3):
        child = wait_for(Child(end, tmp_path / "log"))
        check(s, AtWork(job, child, None))
    assert s.value(job) is None


def test_a_job_whose_result_is_lost_does_not_run_for_ever(tmp_path):
    s = plan(tmp_path, trials=2)
    child = wait_for(Child(lambda: None, tmp_path / "log"))
    with pytest.raises(CheckpointError, match="trials/001 has ended, .* delete that folder"):
        check(s, AtWork(Job("trials/001", 8), child, None))


def test_a_winner_that_cannot_be_tested_ends_the_sweep_and_stays_the_winner(tmp_path):
    s = plan(tmp_path, trials=2, test=True)
    with pytest.raises(UserError, match="a broken picture"):
        fail(s, Job("seeds/001-1", None), UserError("a broken picture"))
    assert not list(tmp_path.rglob("failed.json"))


# Whole sweeps

TRAINED = {"train__epochs": 4, "model__cpu_kernels": "off", "train__log_every_steps": 5}
ARGUMENTS = ["--space=optim.learning_rate=log(0.001, 0.1)", "--trials=4", "--rungs=2"]
ARGUMENTS += ["--finalists=1", "--seeds=2"]


def begin(workdir, *arguments):
    config = ["--config=configs/digits.py", *flags_of(small_config(**TRAINED))]
    return Command("imgcls", "sweep", f"--workdir={workdir}", *config, *arguments, env=as_users())


def finish(workdir, *arguments) -> str:
    process = begin(workdir, *arguments)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def everything(workdir):
    """Arrays, rows and results of all runs, and of the sweep."""
    found = {"results": json.loads((workdir / "results.json").read_text())}
    for folder in sorted(workdir.glob("[st]*s/*")):
        rows = without_times(read_metrics(folder / "metrics.jsonl"))
        checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
        leaves = checkpoints.read_meta()["leaves"] if checkpoints.steps() else None
        found[str(folder.relative_to(workdir))] = (rows, leaves)
    return found


@pytest.mark.slow
def test_killed_workers_end_where_one_undisturbed_worker_ends(tmp_path):
    one_core = ["--cores=1"]
    printed = finish(tmp_path / "one", *ARGUMENTS, *one_core)
    assert "trials/003  epoch 2" in printed and "sweep.html" in printed
    undisturbed = everything(tmp_path / "one")
    assert len(undisturbed) == 1 + 4 + 2 * len(undisturbed["results"]["finalists"])

    two = tmp_path / "two"
    arguments = [*ARGUMENTS, *one_core, "--workers=2"]
    first = begin(two, *arguments)
    time.sleep(6)
    second = begin(two, *arguments)
    time.sleep(6)
    first.kill()
    first.communicate()
    time.sleep(4)
    second.send_signal(signal.SIGTERM)
    printed, _ = second.communicate(timeout=60)
    assert second.returncode in (143, 0), printed
    third = begin(two, *arguments)
    time.sleep(5)
    third.kill()
    third.communicate()
    finish(two, *arguments)
    assert everything(two) == undisturbed
    assert not list(two.glob("trials/*/results.json")), "test was opened"
    finish(two, *arguments)  # again: nothing to do


@pytest.mark.slow
def test_a_sweep_from_python_never_opens_test(tmp_path):
    config = small_config(**TRAINED)
    results = sweep(config, RATES, trials=2, seeds=1, finalists=1, workdir=tmp_path, workers=2)
    assert results["finalists"][0]["top1"] > 0
    assert results == sweep(config, RATES, trials=2, seeds=1, finalists=1, workdir=tmp_path)
    assert not list(tmp_path.glob("*/*/test_evaluations.jsonl"))
    with pytest.raises(UserError, match="holds another sweep"):
        sweep(config, {}, trials=2, seeds=1, workdir=tmp_path)
    with pytest.raises(UserError, match=r"train\[:100000\]"):
        sweep(small_config(**TRAINED, data__train="train[:100000]"), {}, workdir=tmp_path / "b")
