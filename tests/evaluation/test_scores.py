"""Metrics agree with scikit-learn, with small cases by hand, and with themselves."""

import json

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn import metrics as sk

from imgcls.errors import DivergedError
from imgcls.evaluation.scores import (
    evaluate_logits,
    fit_temperature,
    reliability,
    score,
    wilson_interval,
)
from imgcls.task import Classification

NAMES = tuple("abcdefg")


@pytest.fixture
def split():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 500).astype(np.int32)
    logits = rng.normal(size=(500, 7)).astype(np.float32) * 2
    logits[np.arange(500), labels] += 2
    return logits, labels


def test_agrees_with_scikit_learn(split):
    logits, labels = split
    probs, predicted = softmax(logits.astype(np.float64), axis=1), logits.argmax(axis=1)
    scores = evaluate_logits(logits, labels, NAMES)
    assert scores["examples"] == 500
    assert scores["top1"] == sk.accuracy_score(labels, predicted)
    assert scores["top5"] == sk.top_k_accuracy_score(labels, probs, k=5)
    assert scores["loss"] == pytest.approx(sk.log_loss(labels, probs), abs=1e-12)
    brier = ((probs - np.eye(7)[labels]) ** 2).sum(axis=1).mean()
    assert scores["brier"] == pytest.approx(brier, abs=1e-12)
    assert scores["confusion_matrix"] == sk.confusion_matrix(labels, predicted).tolist()
    per_class = sk.precision_recall_fscore_support(labels, predicted)
    for key, expected in zip(("precision", "recall", "f1", "support"), per_class):
        np.testing.assert_allclose([row[key] for row in scores["per_class"]], expected)
    for average in ("macro", "weighted"):
        expected = sk.precision_recall_fscore_support(labels, predicted, average=average)
        for key, value in zip(("precision", "recall", "f1"), expected):
            assert scores[average][key] == pytest.approx(value, abs=1e-12)
        expected = sk.average_precision_score(np.eye(7)[labels], probs, average=average)
        assert scores[average]["average_precision"] == pytest.approx(expected, abs=1e-12)


def test_a_small_case_by_hand():
    probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])
    scores = evaluate_logits(np.log(probs), np.array([0, 1, 0, 1]), ("no", "yes"))
    assert scores["top1"] == 0.75
    assert scores["top5"] == 1.0
    assert scores["loss"] == pytest.approx(-np.log([0.9, 0.2, 0.7, 0.6]).mean())
    assert scores["brier"] == pytest.approx(2 * np.mean([0.01, 0.64, 0.09, 0.16]))
    assert scores["confusion_matrix"] == [[2, 0], [1, 1]]
    no, yes = scores["per_class"]
    assert (no["precision"], no["recall"], no["support"]) == (pytest.approx(2 / 3), 1.0, 2)
    assert (yes["precision"], yes["recall"], yes["f1"]) == (1.0, 0.5, pytest.approx(2 / 3))
    # "yes" in order of its probability: example 3 (yes), 2 (no), 1 (yes), 0 (no).
    assert yes["average_precision"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    # Each of the four confidences is alone in its bin.
    assert scores["calibration"]["ece"] == pytest.approx(np.mean([0.1, 0.8, 0.3, 0.4]))


def test_calibration_error_averages_within_bins_first():
    """Two of confidence 0.75 in one bin, one right: |0.5 - 0.75|, not (0.25 + 0.75) / 2."""
    logits = np.log([[0.75, 0.25], [0.75, 0.25]])
    calibration = evaluate_logits(logits, np.array([0, 1]), "ab")["calibration"]
    assert calibration["ece"] == pytest.approx(0.25)
    filled = [row for row in calibration["reliability"] if row["count"]]
    assert len(calibration["reliability"]) == calibration["bins"] == 15
    assert [row["count"] for row in filled] == [2]
    assert filled[0]["confidence"] == pytest.approx(0.75)
    assert filled[0]["accuracy"] == 0.5
    assert filled[0]["lower"] < 0.75 <= filled[0]["upper"]
    empty = calibration["reliability"][0]
    assert (empty["confidence"], empty["accuracy"], empty["count"]) == (None, None, 0)


def test_reliability_bins_hold_their_confidences(split):
    for row in reliability(*split):
        if row["count"]:
            assert row["lower"] < row["confidence"] <= row["upper"]
    assert sum(row["count"] for row in reliability(*split)) == 500


@pytest.mark.parametrize(
    ("successes", "n", "interval"),
    [(5, 10, (0.2366, 0.7634)), (0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0))],
)
def test_wilson_interval(successes, n, interval):
    assert wilson_interval(successes, n) == pytest.approx(interval, abs=5e-5)


def test_a_class_that_does_not_occur(split):
    logits, labels = split
    kept = labels != 3
    logits, labels = logits[kept], labels[kept]
    scores = evaluate_logits(logits, labels, NAMES)
    absent = scores["per_class"][3]
    assert absent["support"] == 0
    assert absent["recall"] is None and absent["average_precision"] is None
    assert absent["precision"] == 0 and absent["f1"] == 0  # it is predicted, and always wrongly
    assert scores["confusion_matrix"][3] == [0] * 7
    present = [row["recall"] for row in scores["per_class"] if row["support"]]
    assert scores["macro"]["recall"] == pytest.approx(np.mean(present))
    assert scores["weighted"]["recall"] == pytest.approx(scores["top1"])
    json.dumps(scores, allow_nan=False)


def test_a_class_never_predicted_counts_as_zero_in_the_average():
    logits = np.array([[2.0, 0, -9, -9], [0, 2, -9, -9], [2, 0, -9, -9]])
    scores = evaluate_logits(logits, np.array([0, 1, 2]), "abcd")  # nor does d occur
    assert np.shape(scores["confusion_matrix"]) == (4, 4)
    assert scores["per_class"][2]["precision"] is None
    assert scores["per_class"][2]["f1"] == 0
    assert scores["macro"]["precision"] == pytest.approx((0.5 + 1 + 0) / 3)


def test_ties_go_to_the_lower_class_everywhere():
    labels = np.arange(8)
    scores = evaluate_logits(np.zeros((8, 8)), labels, "abcdefgh")
    assert (scores["top1"], scores["top5"]) == (1 / 8, 5 / 8)
    assert np.trace(scores["confusion_matrix"]) == 1


def test_extreme_logits_stay_finite():
    logits = np.array([[3e38, -3e38], [-3e38, 3e38], [1e-30, 0.0]], np.float32)
    scores = evaluate_logits(logits, np.array([0, 0, 0]), "ab")
    json.dumps(scores, allow_nan=False)
    assert np.trace(scores["confusion_matrix"]) == 2 == round(scores["top1"] * 3)


def test_temperature_undoes_a_known_overconfidence():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(20_000, 4)) * 2
    probs = softmax(logits, axis=1)
    labels = (probs.cumsum(axis=1) > rng.random((20_000, 1))).argmax(axis=1)
    assert fit_temperature(3 * logits, labels) == pytest.approx(3, rel=0.03)
    scored = score(Classification(), logits, labels, "abcd", validation=(3 * logits, labels))
    assert scored["calibration"]["temperature"] == fit_temperature(3 * logits, labels)
    scores = evaluate_logits(3 * logits, labels, "abcd", temperature=3.0)
    before, after = scores["calibration"]["before"], scores["calibration"]["after"]
    assert before["loss"] == scores["loss"] and before["ece"] == scores["calibration"]["ece"]
    assert after["loss"] == pytest.approx(
        -log_softmax(logits, axis=1)[np.arange(20_000), labels].mean()
    )
    assert after["ece"] < 0.02 < before["ece"]
    assert after["brier"] < before["brier"]


def test_few_examples_that_are_all_right_are_no_proof_of_certainty():
    few, many = (fit_temperature(np.eye(4)[i], i) for i in (np.arange(4), np.arange(4000) % 4))
    assert 0.25 < few < 0.8 and 0.05 <= many < 0.2
    log_t = np.log(fit_temperature(np.array([[2.0, 0.0]]), np.array([0])))
    margin = 2 * np.exp(-log_t)  # where the derivative of NLL and prior is zero
    assert log_t == pytest.approx(-margin / (1 + np.exp(margin)), abs=1e-4)


def test_no_temperature_is_beyond_a_twentieth_and_twenty():
    logits, labels = np.tile([0.01, 0.0], (10**5, 1)), np.zeros(10**5, int)
    assert fit_temperature(logits, labels) == pytest.approx(0.05, rel=1e-3)
    assert fit_temperature(1000 * logits, 1 - labels) == pytest.approx(20, rel=1e-3)


def test_each_bin_of_confidence_ends_where_the_next_begins_and_the_first_has_the_least():
    bins = reliability(np.zeros((4, 20)), np.zeros(4, int))  # sure by a twentieth
    assert [row["lower"] for row in bins[1:]] == [row["upper"] for row in bins[:-1]]
    assert (bins[0]["count"], bins[-1]["upper"]) == (4, 1)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(split, broken):
    logits, labels = split
    logits[[17, 40], 2] = broken
    with pytest.raises(DivergedError, match="2 of 500 examples are not finite, first 17"):
        evaluate_logits(logits, labels, NAMES)
    with pytest.raises(DivergedError, match="not finite"):
        fit_temperature(logits, labels)


class Broken(Classification):
    def figures(self, logits, targets, *, train):
        return {"loss": np.full(len(logits), np.nan)}


def test_a_task_of_which_only_the_figures_are_not_finite_has_not_diverged(split):
    """Its code is wrong: an error of its own, with a traceback."""
    logits, labels = split
    vectors = np.eye(logits.shape[1], dtype=np.float32)[labels]
    with pytest.raises(ValueError, match="figures are not finite"):
        score(Broken(), logits, vectors, NAMES)
    logits[3, 1] = np.nan
    with pytest.raises(DivergedError, match="1 of 500 examples"):
        score(Broken(), logits, vectors, NAMES)


@pytest.mark.parametrize(
    ("logits", "labels", "names", "message"),
    [
        (np.zeros((2, 3)), [0, 3], "abc", "label 3 of example 1"),
        (np.zeros((2, 3)), [-1, 0], "abc", "label -1 of example 0"),
        (np.zeros((2, 3)), [0], "abc", r"\(2, 3\) and \(1,\)"),
        (np.zeros((0, 3)), [], "abc", r"\(0, 3\)"),
        (np.zeros((2, 3)), [0, 1], "ab", "3 logits an example, but 2 class names"),
    ],
)
def test_what_does_not_fit_is_refused(logits, labels, names, message):
    with pytest.raises(ValueError, match=message):
        evaluate_logits(logits, np.array(labels, np.int32), names)
