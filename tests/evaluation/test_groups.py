"""Comparing groups of runs: Welch by hand and by scipy, how many runs it takes, and the command."""

import re
import statistics
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from imgcls.errors import UserError
from imgcls.evaluation.compare import read_groups
from imgcls.evaluation.groups import POWER, as_text, compare_groups, student_interval, welch
from tests.commands import run_command
from tests.helpers import write_run

A, B = [0.941, 0.9425, 0.9385, 0.9402], [0.945, 0.9525, 0.9431]


def test_welch_by_hand():
    found = welch([1.0, 2.0, 3.0], [4.0, 6.0, 8.0, 10.0])  # variances 1 and 20 / 3
    assert found["difference"] == 5
    error, freedom = 2**0.5, 4 / (1 / 9 / 2 + 25 / 9 / 3)  # of 1 / 3 and 5 / 3
    half = stats.t.ppf(0.975, freedom) * error
    assert found["interval"] == pytest.approx([5 - half, 5 + half])
    assert found["effect"] == pytest.approx(5 / (23 / 6) ** 0.5)


@pytest.mark.parametrize("a, b", [(A, B), (B, A), (A, A), (A[:2], B[:2])])
def test_welch_is_scipys(a, b):
    found, expected = welch(a, b), stats.ttest_ind(b, a, equal_var=False)
    assert found["p_value"] == pytest.approx(expected.pvalue)
    assert found["interval"] == pytest.approx([*expected.confidence_interval(0.95)])
    assert found["difference"] == statistics.fmean(b) - statistics.fmean(a)


@pytest.mark.parametrize("a, b", [([0.9], [0.92]), ([0.9], B), ([0.1] * 3, [0.12] * 3)], ids=str)
def test_groups_that_cannot_vary_have_a_difference_alone(a, b):
    found = welch(a, b)
    assert found.pop("difference") == pytest.approx(statistics.fmean(b) - statistics.fmean(a))
    assert set(found.values()) == {None}


def test_a_group_whose_values_are_equal_is_compared_with_one_that_varies():
    found = welch([0.1] * 3, A)
    assert found["p_value"] == pytest.approx(stats.ttest_1samp(A, 0.1).pvalue)


def test_equal_means_need_no_number_of_runs():
    found = welch([0.5, 0.25], [0.25, 0.5])
    assert (found["difference"], found["effect"], found["runs_needed"]) == (0, 0, None)
    assert found["p_value"] == 1


@pytest.mark.parametrize("effect", [0.5, 1.0, 2.0, 4.0])
def test_so_many_runs_find_the_difference_as_often_as_promised(effect):
    wanted = [0.5**0.5, -(0.5**0.5)]  # of variance 1
    runs = welch(wanted, [value + effect for value in wanted])["runs_needed"]
    assert _power(effect, runs) > POWER - 0.05
    assert runs == 3 or _power(effect, runs - 2) < POWER


def _power(effect: float, runs: int) -> float:
    """How often Welch's test finds a difference of `effect` standard deviations."""
    a, b = np.random.default_rng(0).normal(size=(2, 8000, runs))
    return (stats.ttest_ind(a, b + effect, axis=1, equal_var=False).pvalue < 0.05).mean()


def test_the_interval_of_a_mean_is_students_and_takes_three_values():
    expected = stats.ttest_1samp(A, 0).confidence_interval(0.95)
    assert student_interval(A) == pytest.approx([*expected])
    half = 4.30265273 / 3**0.5  # t with two degrees of freedom
    assert student_interval([1.0, 2.0, 3.0]) == pytest.approx([2 - half, 2 + half])
    assert student_interval([0.5] * 3) == [0.5, 0.5]
    assert student_interval(A[:2]) is None


def write_runs(folder: Path, wrong: list[int], **config) -> list[Path]:
    """A run per seed, wrong in its first examples of 200, as many as given."""
    labels = np.arange(200, dtype=np.int32) % 2
    workdirs = []
    for seed, count in enumerate(wrong):
        predicted = np.where(np.arange(200) < count, 1 - labels, labels)
        own = {"seed": seed, "model": {"name": "cnn"}, "data": {"dir": str(folder)}} | config
        logits = np.eye(2, dtype=np.float32)[predicted]
        workdirs.append(write_run(folder / f"000-{seed}", logits, labels, config=own))
    return workdirs


@pytest.fixture
def groups(tmp_path):
    a = write_runs(tmp_path / "a", [20, 22, 24])
    return a, write_runs(tmp_path / "b", [10, 14, 12, 16], model={"name": "mlp"})


def test_groups_are_compared_over_seeds_and_over_examples(groups):
    found = compare_groups(*read_groups(*groups))
    a, b = [0.9, 0.89, 0.88], [0.95, 0.93, 0.94, 0.92]
    assert found["top1"]["A"] == pytest.approx(a) and found["top1"]["B"] == pytest.approx(b)
    assert found["seeds"] == welch(*found["top1"].values())
    # Per example: the share of B's runs that are right, less that of A's.
    gain = np.repeat([0, 1 / 4, 2 / 4, 3 / 4, 1, 2 / 3, 1 / 3, 0], [10, 2, 2, 2, 4, 2, 2, 176])
    half = 1.96 * statistics.stdev(gain.tolist()) / 200**0.5
    assert found["examples"]["difference"] == pytest.approx(0.045)
    assert found["examples"]["interval"] == pytest.approx([0.045 - half, 0.045 + half])
    text = as_text(found)
    assert "A: 89.00% over 3 runs, 95% interval 86.52 to 91.48" in text
    assert "B - A: +4.50 points" in text and "would be needed" not in text


def test_few_runs_are_told_that_they_are_few(groups):
    a, b = groups
    text = as_text(compare_groups(*read_groups(a[:2], b[:1])))
    assert text.count("no interval below 3 runs") == 2 and "Welch" not in text
    near = write_runs(b[0].parents[1] / "near", [21, 25, 18, 22])
    text = as_text(compare_groups(*read_groups(a, near)))
    assert "runs a group would be needed" in text


def test_what_is_no_two_groups_of_one_config_each_is_refused(groups, tmp_path):
    a, b = groups
    for left, right in ((a, []), ([], b), (a, [*b, "-", *a])):
        with pytest.raises(UserError, match="name the runs of two groups"):
            read_groups(left, right)
    with pytest.raises(UserError, match=r"000-0 and .*000-1 differ in config\.model\.name"):
        read_groups(a, [b[0], a[1]])
    with pytest.raises(UserError, match=r"seeds .* are \[0, 1, 2, 0\]: each may come only once"):
        read_groups([*a, a[0]], b)
    other = write_run(tmp_path / "c", np.eye(2, dtype=np.float32), np.array([0, 1]))
    with pytest.raises(UserError, match=r"different examples \(200 and 2 examples\)"):
        read_groups(a, [other])


@pytest.mark.slow
def test_the_command_divides_its_arguments_at_two_dashes(groups, tmp_path):
    command = partial(run_command, "imgcls", "compare", *groups[0], "--", cwd=tmp_path)
    done = command(*groups[1])
    assert done.returncode == 0, done.stderr
    assert "200 test examples" in done.stdout and "B - A: +4.50 points" in done.stdout
    assert "Welch p = 0.0" in done.stdout and re.search(r"model\.name +cnn +mlp", done.stdout)
    for arguments, remedy in [([], "name the runs"), (["b", "--output=x"], "--output: ")]:
        done = command(*arguments)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {remedy}"), done.stderr
    assert not list(tmp_path.glob("*.html"))
