"""The programs in benchmarks/: their statistics, what they refuse, and the documents' tables."""

import json
from argparse import Namespace

import common
import contenders
import jax
import networks
import numpy as np
import photographs
import pytest
import tables
import time_to_accuracy
import train_step
from PIL import Image
from scipy.stats import ttest_1samp

from imgcls import experiment
from imgcls.errors import UserError
from tests.helpers import ROOT, flags_of, random_logits, small_config, write_run


def fake_run(workdir, seed, command_seconds=None, **changes):
    """A finished run of 300 examples; other seeds have other accuracy."""
    logits, labels = random_logits(300, 3, seed)
    results = {"device": "cpu", "versions": {"jax": "1"}, "git_commit": "a" * 40}
    results |= {"seconds": 10.0 + seed, "images_per_second": 100.0}
    config = {"seed": seed, "data": {"name": "toy", "dir": str(workdir)}, "epochs": 3}
    config |= changes.pop("config", {})
    write_run(workdir, logits, labels, config=config, **(results | changes))
    if command_seconds:
        command = {"seconds": command_seconds, "machine": "a laptop"}
        (workdir / "command.json").write_text(json.dumps(command))
    return workdir


def top1_of(workdir):
    return json.loads((workdir / "results.json").read_text())["top1"]


def summary_of(*workdirs, **values):
    summary = time_to_accuracy.collect(list(workdirs))
    return summary | {"name": "toy", "note": "", "machine": "a laptop"} | values


def write_summary(folder, config, summary):
    folder.mkdir(exist_ok=True)
    (folder / f"{config}.json").write_text(json.dumps(summary | {"name": config}))


def test_runs_that_differ_in_their_seed_are_summarised(tmp_path):
    runs = [fake_run(tmp_path / str(seed), seed, 20.0 + seed) for seed in range(3)]
    top1 = [top1_of(run) for run in runs]
    assert len(set(top1)) == 3
    summary = time_to_accuracy.collect(runs)
    assert summary["top1"]["mean"] == pytest.approx(np.mean(top1))
    expected = ttest_1samp(top1, 0).confidence_interval(0.95)
    assert summary["top1"]["interval"] == pytest.approx([*expected])
    assert summary["top1"]["over"] == "3 seeds"
    assert summary["seconds"] == {"command": 21.0, "inside": 11.0}
    assert [(row["seed"], row["top1"]) for row in summary["seeds"]] == list(enumerate(top1))
    assert (summary["machine"], summary["git_commit"]) == ("a laptop", "a" * 40)
    assert "seed" not in summary["config"]
    assert time_to_accuracy.collect(runs[:2])["top1"]["interval"] is None


def test_one_run_has_the_interval_over_its_examples_and_says_so(tmp_path):
    run = fake_run(tmp_path / "run", 4)
    summary = time_to_accuracy.collect([run])
    results = json.loads((run / "results.json").read_text())
    assert summary["top1"]["interval"] == results["top1_interval"]
    assert summary["top1"]["over"] == "examples, one seed"
    assert summary["seconds"] == {"command": None, "inside": 14.0}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"config": {"epochs": 4}}, "another config than"),
        ({"config": {"seed": 0}}, "each may come only once"),
        ({"git_commit": "b" * 40}, "another git_commit than"),
        ({"versions": {"jax": "2"}}, "another versions than"),
        ({"command_seconds": 9.0}, "another machine than"),
    ],
    ids=str,
)
def test_runs_that_differ_in_more_are_refused(tmp_path, changes, message):
    runs = [fake_run(tmp_path / "a", 0), fake_run(tmp_path / "b", 1, **changes)]
    with pytest.raises(UserError, match=message):
        time_to_accuracy.collect(runs)


def test_an_unfinished_run_is_refused(tmp_path):
    run = fake_run(tmp_path / "run", 0)
    (run / "results.json").unlink()
    with pytest.raises(UserError, match=r"results\.json does not exist"):
        time_to_accuracy.collect([run])


@pytest.mark.slow
def test_the_command_trains_the_seeds_and_the_time_is_of_the_whole(tmp_path, monkeypatch):
    flags = [*flags_of(small_config(train__epochs=1)), "--config.model.cpu_kernels=off"]
    output = tmp_path / "out" / "digits.json"
    arguments = ["--config=configs/digits.py", "--seeds=2", f"--workdir={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["x", *arguments, f"--output={output}", *flags])
    time_to_accuracy.main()
    summary = json.loads(output.read_text())
    assert [row["seed"] for row in summary["seeds"]] == [0, 1]
    assert summary["config"]["train"]["epochs"] == 1
    assert summary["seconds"]["command"] > summary["seconds"]["inside"] > 0
    assert summary["machine"] == common.machine()
    # A second time nothing is trained, and the time stays that of the first.
    time_to_accuracy.main()
    assert json.loads(output.read_text()) == summary


def test_a_table_row_tells_what_its_figures_are_over(tmp_path):
    runs = [fake_run(tmp_path / str(seed), seed, 20.0 + seed) for seed in range(3)]
    results = tmp_path / "results"
    write_summary(results, "many", summary_of(*runs))
    write_summary(results, "one", summary_of(fake_run(tmp_path / "s", 5), note="a note"))
    write_summary(results, "two", summary_of(*runs[:2]))
    (results / "other.json").write_text('{"cifar10, AVX2": {"ratio": 1}}')
    lines = tables.results(results).splitlines()
    many, one, two = lines[2:5]
    assert many.startswith("| `many` |") and many.endswith("(over 3 seeds) | 21 s |")
    assert one.startswith("| `one` (a note) |")
    assert one.endswith("(over examples, one seed) | 15 s without imports |")
    correct = round(300 * top1_of(tmp_path / "s"))
    assert f"({correct}/300)" in one
    assert "% | none (over 2 seeds) |" in two
    assert lines[5] == "" and "`many`, `one`, `two`: a laptop." in lines[6] and len(lines) == 7


def test_a_trial_is_compared_with_the_seeds_that_its_recipe_has_too(tmp_path):
    recipe = {"network": "n", "base": None, "name": "r", "change": "the recipe", "verdict": ""}
    recipe |= {"top1": 90.5, "seeds": {"0": 90.0, "1": 91.0}, "seconds": 1200, "cores": 1}
    values = {"both": [90.75, {"0": 90.5, "1": 91.0}], "one": [91.5, {"1": 91.5}], "no": [89.5, {}]}
    trials = [recipe, {**recipe, "network": "another"}]
    for change, (top1, seeds) in values.items():
        kept = {"network": "n", "base": "r", "change": change, "verdict": "v", "cores": 2}
        trials.append({**kept, "top1": top1, "seeds": seeds, "seconds": None})
    path = tmp_path / "trials.jsonl"
    path.write_text("".join(json.dumps(trial) + "\n" for trial in trials))
    assert tables.trials("n", path).splitlines()[2:] == [
        "| **the recipe** | **90.50%** (90.00, 91.00) | 1,200 s, 1 core |  |",
        "| both | +0.25 (+0.50, +0.00) |  | v |",
        "| one | +0.50 (seed 1) |  | v |",
        "| no | -1.00 (1 seed) |  | v |",
    ]


def test_every_trial_stands_in_a_table():
    trials = [json.loads(line) for line in tables.TRIALS.read_text("utf-8").splitlines()]
    recipes = {(trial["network"], trial["name"]) for trial in trials if trial["base"] is None}
    others = [trial for trial in trials if trial["base"] is not None]
    assert all((trial["network"], trial["base"]) in recipes for trial in others)
    recipes_md = tables.documents()[ROOT / "docs/recipes.md"]
    rows = sum(len(table.splitlines()) - 2 for table in recipes_md.values())
    assert rows == len(trials)


@pytest.mark.parametrize("path", tables.documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_documents_have_the_tables_of_the_files(path):
    text = path.read_text(encoding="utf-8")
    message = f"{path} and its figures differ: run python benchmarks/tables.py"
    assert tables.rewritten(text, tables.documents()[path]) == text, message


def test_rewriting_a_table_leaves_the_rest_of_the_text_alone():
    text = "before\n<!-- one -->\nold\\1\n<!-- /one -->\nafter\n"
    assert tables.rewritten(text, {"one": r"new \1"}) == text.replace("old\\1", r"new \1")
    for names in ((), ("one", "two")):
        with pytest.raises(ValueError, match="the text has the markers"):
            tables.rewritten(text, dict.fromkeys(names, "table"))


@pytest.mark.parametrize("network", contenders.NETWORKS)
def test_the_alternatives_are_given_the_projects_own_network(network):
    config = contenders.network_config(network)
    layers = networks.layers_of(config, contenders.CLASSES)
    models = experiment.build_model(config, contenders.CLASSES), networks.linen(layers, "float32")
    images = np.zeros((2, *config.data.image_size, config.data.channels), np.float32)
    ours, plain = (
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)["params"]
        for model in models
    )
    assert sorted(p.shape for p in jax.tree.leaves(ours)) == sorted(
        p.shape for p in jax.tree.leaves(plain)
    )


def test_no_figure_of_bfloat16_is_one_of_float32(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # without bfloat16
    flags = ["--serve=imgcls-bfloat16", "--network=cifar10", "--batch_size=2", "--steps=1"]
    worker = common.Worker(ROOT / train_step.PROGRAM, flags)
    assert worker.hello == {"error": "NotImplementedError: bfloat16 is not fast on this CPU"}
    worker.close()


def test_a_baseline_is_the_step_that_another_checkout_serves(tmp_path):
    program = tmp_path / train_step.PROGRAM
    program.parent.mkdir()
    program.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import common\n"
        "assert {'--serve=imgcls-float32', '--measure=train', '--steps=2'} <= {*sys.argv}\n"
        "common.serve(lambda: ({'parameters': 7}, lambda count: {'seconds': 0.5 * count}))"
    )
    arguments = Namespace(contenders=["baseline-float32"], baseline=tmp_path, measure="train")
    arguments.batch_size, arguments.steps, arguments.repetitions = 16, 2, 3
    measured = train_step.measure("cifar10", arguments)
    assert measured["images_per_second"] == {"baseline-float32": 32.0}
    assert (measured["parameters"], measured["absent"]) == (7, {})


def test_imgcls_does_the_steps_and_evaluates_the_images_that_it_is_asked_for():
    config = small_config(model__cpu_kernels="off", data__validation="")
    ours = contenders.Imgcls(config, examples=80)
    ours.train(2)
    assert int(ours.state.step) == 2
    ours.batch = ours.experiment.train_batch(1)
    ours.train(1)
    assert int(ours.state.step) == 3
    ours.evaluate(50)


@pytest.mark.parametrize(
    "body, hello",
    [
        ("print('noise'); return {'ready': 1}, lambda x: {'half': 6 // x}", {"ready": 1}),
        ("import nowhere", {"error": "ModuleNotFoundError: No module named 'nowhere'"}),
        ("raise ModuleNotFoundError(name='torch')", {"error": "not installed"}),
        ("import os; os._exit(7)", {"error": "exit code 7"}),
    ],
)
def test_a_worker_answers_or_says_why_not(tmp_path, body, hello):
    script = tmp_path / "worker.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import common\n"
        f"def start(): {body}\ncommon.serve(start)"
    )
    worker = common.Worker(script, [])
    assert worker.hello == hello
    if "ready" in hello:
        assert worker.ask(x=2) == {"half": 3}
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            worker.ask(x=0)
    worker.close()


@pytest.mark.slow
def test_photographs_are_learned_here_and_in_pytorch(tmp_path):
    for n in range(40):
        (folder := tmp_path / "pictures" / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 50, 3), 6 * n, np.uint8)).save(folder / f"{n}.png")
    arguments = [f"--data_dir={tmp_path / 'pictures'}", f"--workdir={tmp_path / 'run'}", "--quick"]
    found = photographs.main(arguments)
    assert found["imgcls"]["step"] == 4 and 0 <= found["imgcls"]["top1"] <= 1
    if "error" not in found["torch"]:  # PyTorch is no requirement of the tests
        assert found["torch"]["parameters"] == found["imgcls"]["parameters"]
        assert found["torch"]["seconds"] >= found["imgcls"]["seconds"]
