"""Comparing runs: paired statistics by hand, the refusals, and the command."""

import json

import numpy as np
import pytest
from scipy.stats import binomtest

from imgcls.errors import UserError
from imgcls.evaluation.compare import as_text, compare
from tests.commands import run_fresh
from tests.helpers import random_logits, write_run


def logits_of(predicted):
    """float32[N, 3] whose argmax is as given."""
    return np.eye(3, dtype=np.float32)[np.asarray(predicted)]


@pytest.fixture
def runs(tmp_path):
    """Of 100 examples, B wins 8 that A loses and loses 2 that A wins, all of class 1."""
    labels = np.repeat([0, 1], 50).astype(np.int32)
    a, b = labels.copy(), labels.copy()
    a[50:58] = 2
    b[90:92] = 0
    both_wrong = [0, 1, 2]
    a[both_wrong] = b[both_wrong] = 1
    common = {"temperature": None, "seconds": 60.0, "parameters": 1000}
    config = {"seed": 0, "model": {"name": "cnn", "width": 8}}
    other = {"seed": 0, "model": {"name": "mlp", "width": 8}, "new": True}
    return [
        write_run(tmp_path / "a", logits_of(a), labels, config=config, **common),
        write_run(tmp_path / "b", logits_of(b), labels, config=other, **common),
    ]


def test_a_paired_difference_by_hand(runs):
    comparison = compare(runs)
    a, b = comparison["runs"]
    assert (a["letter"], a["top1"], b["letter"], b["top1"]) == ("A", 0.89, "B", 0.95)
    assert (a["seconds"], a.get("images_per_second"), a["parameters"]) == (60.0, None, 1000)
    (row,) = comparison["differences"]
    assert (row["letter"], row["gained"], row["lost"]) == ("B", 8, 2)
    assert row["difference"] == pytest.approx(0.06)
    assert row["p_value"] == pytest.approx(2 * (1 + 10 + 45) / 2**10)  # the tails of ten coins
    zero, one, absent = comparison["per_class"]
    assert zero["recall"] == [0.94, 0.94]
    assert one["recall"] == pytest.approx([0.84, 0.96])
    assert (absent["support"], absent["recall"]) == (0, [None, None])
    assert comparison["config"] == {"model.name": ["cnn", "mlp"], "new": [None, True]}


def test_the_interval_repeats_and_is_the_bootstrap_of_paired_examples(tmp_path):
    labels = np.zeros(20_000, np.int32)
    a, b = labels.copy(), labels.copy()
    a[:3000], b[-2000:] = 1, 1
    runs = [write_run(tmp_path / name, logits_of(p), labels) for name, p in [("a", a), ("b", b)]]
    intervals = [compare(runs)["differences"][0]["interval"] for _ in range(3)]
    assert intervals[0] == intervals[1] == intervals[2]
    values = np.array([1] * 3000 + [-1] * 2000 + [0] * 15_000)
    rng = np.random.default_rng(5)
    draws = [rng.choice(values, len(values)).mean() for _ in range(2000)]
    assert intervals[0] == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=6e-4)
    assert intervals[0] == pytest.approx(0.05 + 1.96 * 0.00350 * np.array([-1, 1]), abs=3e-4)


def test_the_order_of_two_runs_only_turns_the_sign(runs):
    (forth,), (back,) = (compare(order)["differences"] for order in (runs, runs[::-1]))
    assert forth["difference"] == -back["difference"]
    assert forth["p_value"] == back["p_value"]
    assert (forth["gained"], forth["lost"]) == (back["lost"], back["gained"])


def test_a_run_does_not_differ_from_itself(runs):
    comparison = compare([runs[0], runs[0], runs[1]])
    same, other = comparison["differences"]
    assert (same["difference"], same["interval"], same["p_value"]) == (0, [0, 0], 1)
    assert (other["letter"], other["gained"]) == ("C", 8)
    assert other["p_value"] == binomtest(8, 10).pvalue


def test_runs_of_different_test_examples_are_refused(tmp_path):
    logits, labels = random_logits(30, 3)
    ids = [f"test/{i}" for i in range(30)]
    a = write_run(tmp_path / "a", logits, labels, ids=ids)
    other_labels, other_ids = labels.copy(), ids.copy()
    other_labels[4], other_ids[7] = 2, "test/x"
    for run, difference in [
        (
            write_run(tmp_path / "b", logits, other_labels),
            "example 4 is 'test/4' of class 'class 1'",
        ),
        (write_run(tmp_path / "c", logits, labels, ids=other_ids), "example 7 is .* and 'test/x'"),
        (write_run(tmp_path / "d", logits[:20], labels[:20]), "30 and 20 examples"),
        (write_run(tmp_path / "e", logits, labels, ["x", "y", "z"]), "their classes differ"),
    ]:
        with pytest.raises(UserError, match=f"tested on different examples .{difference}"):
            compare([a, run])


def test_a_run_of_another_task_is_refused(runs):
    results = json.loads((runs[1] / "results.json").read_text())
    del results["per_class"]
    (runs[1] / "results.json").write_text(json.dumps(results))
    for order in (runs, runs[::-1]):
        with pytest.raises(UserError, match="b is no classification"):
            compare(order)


def test_one_run_is_nothing_to_compare(runs):
    with pytest.raises(UserError, match="at least two workdirs"):
        compare(runs[:1])


def test_a_missing_run_is_named(runs, tmp_path):
    with pytest.raises(UserError, match=r"nowhere/config\.json does not exist"):
        compare([runs[0], tmp_path / "nowhere"])


def test_no_name_drives_the_terminal(tmp_path):
    names = ["\x1b[31mred", "two\nlines", "long" * 50]
    logits, labels = random_logits(30, 3)
    runs = [
        write_run(tmp_path / "a", logits, labels, names, config={"key": "\x1b]0;title\x07"}),
        write_run(tmp_path / "b", -logits, labels, names, config={"key": [1, 2]}),
    ]
    text = as_text(compare(runs))
    assert all(c.isprintable() or c == "\n" for c in text)
    assert r"two\nlines" in text and r"\x1b[31mred" in text and "[1, 2]" in text
    assert max(map(len, text.splitlines())) < 250


def test_the_command_prints_a_table_and_writes_a_page(runs, tmp_path):
    (tmp_path / "two").mkdir()
    hostile = "<script>alert(1)</script>"
    config = json.loads((runs[1] / "config.json").read_text()) | {"note": hostile}
    (runs[1] / "config.json").write_text(json.dumps(config))
    done = run_fresh("imgcls", "compare", *runs, cwd=tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert "B - A: +6.00 points" in done.stdout and "McNemar p = 0.11" in done.stdout
    assert "class 1 +12.0" in done.stdout
    assert done.stdout.endswith("\ncompare.html\n")
    page = (tmp_path / "two" / "compare.html").read_text()
    assert "Content-Security-Policy" in page and "+6.00" in page
    assert "Top-1" in page and "Top-5" not in page  # of three classes
    assert hostile not in page and "&lt;script&gt;alert(1)" in page
