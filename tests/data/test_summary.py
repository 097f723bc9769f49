import logging

import numpy as np
import pytest

from imgcls.data import summary
from imgcls.data.splits import Split
from imgcls.data.summary import describe

RNG = np.random.default_rng(0)


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: found.append(text % args))
    return found


def split(*counts: int, **options) -> Split:
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    names = ("ant", "bee", "cat")[: len(counts)]
    images = RNG.integers(0, 256, (len(labels), 8, 8, 1), np.uint8)
    return Split("train", [images], labels, range(len(labels)), names, **options)


def test_it_tells_of_classes_their_sizes_and_what_a_constant_answer_scores(warnings):
    splits = {"train": split(9, 4, 3, describe=lambda: ["x", "y"]), "test": split(2, 6, 2)}
    classes, found = describe(splits, weighted=False)
    for words in ("3 classes", "train 9 of ant, 3 of cat", "test 6 of bee, 2 of", "20.0% of test"):
        assert words in classes
    assert "always answering ant" in classes and found == "x; y"
    assert not warnings
    assert "test 4 each" in describe({"train": split(5, 5), "test": split(4, 4)}, weighted=False)[0]


def test_it_warns_of_rare_classes_and_of_an_imbalance(warnings):
    splits = {"train": split(41, 4), "test": split(5, 1), "validation": split(5, 0)}
    describe(splits, weighted=False)
    text = "\n".join(warnings)
    assert "test has fewer than 2 examples of bee (1)" in text
    assert "validation has fewer than 2 examples of bee (0)" in text
    assert "train has 41 of ant, 4 of bee" in text
    assert "--config.task.class_weights=balanced" in text
    warnings.clear()
    describe({"train": split(41, 4)}, weighted=True)
    describe({"train": split(40, 4)}, weighted=False)
    assert not warnings


def test_labels_that_are_vectors_have_no_classes_to_count():
    labels = np.ones((3, 2), np.float32)
    images = np.zeros((3, 2, 2, 1), np.uint8)
    train = Split("train", [images], labels, range(3), ("a", "b"), describe=lambda: ["x"])
    assert describe({"train": train}, weighted=False) == ["x"]


def test_it_warns_of_near_duplicates_across_splits(warnings):
    splits = {"train": split(9, 9), "test": split(5, 5)}
    describe(splits, weighted=False)
    assert not warnings
    splits["test"].parts[0][[3, 7]] = splits["train"].parts[0][[2, 2]] // 2 * 2
    describe(splits, weighted=False)
    (text,) = warnings
    assert "2 of test are near-duplicates of train, such as 3 and 2" in text
    assert "split_duplicates=train" in text


def test_a_picture_without_structure_is_a_duplicate_of_its_equal_alone(warnings):
    splits = {"train": split(9, 9), "test": split(5, 5)}
    shades = np.arange(28, dtype=np.uint8)[:, None, None, None] * 9
    splits["train"].parts[0][:], splits["test"].parts[0][:] = shades[:18], shades[18:]
    describe(splits, weighted=False)
    assert not warnings
    splits["test"].parts[0][4] = shades[3]
    describe(splits, weighted=False)
    assert "1 of test are near-duplicates of train, such as 4 and 3" in warnings[0]


def test_splits_that_are_not_searched_for_near_duplicates_are_named(warnings, monkeypatch, caplog):
    monkeypatch.setattr(summary, "COMPARED", 179)
    with caplog.at_level(logging.INFO):
        describe({"train": split(9, 9), "test": split(5, 5)}, weighted=False)
    assert "train and test are too many to be searched" in caplog.text
