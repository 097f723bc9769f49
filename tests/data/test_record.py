"""What a run saw is what it is given later, or the difference is named."""

import dataclasses

import numpy as np
import pytest

from imgcls.data import record
from imgcls.data.splits import Split
from imgcls.errors import CheckpointError, UserError


def make(n=252, name="test", seed=0):
    images = np.random.default_rng(seed).integers(256, size=(n, 4, 4, 3), dtype=np.uint8)
    ids = [f"{name}:cat/{i:04d}.jpg" for i in range(n)]
    return Split(name, [images], np.arange(n, dtype=np.int32) % 2, ids, ("cat", "dog"))


def take(split, rows):
    """Some examples, in an order of its own."""
    parts, ids = [split.parts[0][rows]], [split.ids[i] for i in rows]
    return dataclasses.replace(split, parts=parts, labels=split.labels[rows], ids=ids)


def refusal(workdir, error=UserError, **splits):
    with pytest.raises(error) as caught:
        record.check(workdir, splits)
    text = str(caught.value)
    assert "\n" not in text and str(workdir) in text
    return text


@pytest.fixture
def workdir(tmp_path):
    record.keep(tmp_path, {"test": make(), "train": make(40, "train", 1)})
    return tmp_path


def test_the_same_examples_pass_and_what_the_run_did_not_see(workdir):
    record.check(workdir, {"test": make()})
    record.check(workdir, {"test": make(), "train": make(40, "train", 1)})
    record.check(workdir, {"validation": make(3)})


def test_changed_pictures_are_counted_and_the_first_is_named(workdir):
    images = make().parts[0].copy()
    images[12:49, 3, 3, 2] ^= 1
    changed = dataclasses.replace(make(), parts=[images])
    assert "37 of 252 test pictures changed, first cat/0012.jpg: " in refusal(workdir, test=changed)
    record.check(workdir, {"train": make(40, "train", 1)})


def test_swapped_labels_are_changes(workdir):
    labels = make().labels.copy()
    labels[[7, 8]] = labels[[8, 7]]
    changed = dataclasses.replace(make(), labels=labels)
    assert "2 of 252 test pictures changed, first cat/0007.jpg" in refusal(workdir, test=changed)


def test_pictures_that_came_or_went_or_moved_are_told(workdir):
    more, everything = take(make(300), np.arange(300)), np.arange(252)
    # The first 252 of 300 random pictures are others than 252 random pictures.
    more.parts[0][:252] = make().parts[0]
    shown = "48 of 300 test pictures are new, first cat/0252.jpg (252 then, 300 now)"
    assert shown in refusal(workdir, test=more)
    fewer = take(make(), everything[5:])
    assert "5 of 252 test pictures are gone: " in refusal(workdir, test=fewer)
    assert "another order" in refusal(workdir, test=take(make(), everything[::-1]))
    others = take(make(seed=5), everything[:20])
    assert "20 of 20 test pictures changed" in refusal(workdir, test=others)
    wrong = make(40, "train", 1)
    assert "40 of 40 test pictures changed" in refusal(workdir, test=wrong)


def test_the_first_that_was_seen_counts_until_a_new_run_begins(workdir):
    record.keep(workdir, {"test": make(seed=1), "validation": make(9, "validation")})
    record.check(workdir, {"test": make(), "validation": make(9, "validation")})
    record.keep(workdir, {"test": make(seed=1)}, anew=True)
    record.check(workdir, {"test": make(seed=1), "validation": make(2)})


def test_an_older_run_has_no_record(tmp_path):
    record.check(tmp_path, {"test": make()})
    assert not any(tmp_path.iterdir())


def test_a_record_that_cannot_be_read_is_refused_in_one_line(workdir):
    path = workdir / "data.npz"
    content = path.read_bytes()
    for garbage in (b"", b"\0" * 99, content[:200], content[:-30], b"x" + content[1:], b"{}"):
        path.write_bytes(garbage)
        assert f"{path} cannot be read (" in refusal(workdir, CheckpointError, test=make())
    np.savez(path, test=np.array(["a"]))
    assert "cannot be read" in refusal(workdir, CheckpointError, test=make())
    np.savez(path, test=np.array([None]))
    assert "cannot be read" in refusal(workdir, CheckpointError, test=make())
    np.save(path.with_suffix(".npy"), np.zeros(3))
    path.with_suffix(".npy").rename(path)
    assert "cannot be read" in refusal(workdir, CheckpointError, test=make())
    np.savez(path, test=np.zeros((3, 3), np.float16))
    assert "252 of 252 test pictures changed" in refusal(workdir, test=make())
    path.unlink()
    path.mkdir()
    assert "cannot be read (" in refusal(workdir, CheckpointError, test=make())


def test_the_record_of_a_large_dataset_is_small(tmp_path):
    images = np.zeros((50_000, 1, 1, 1), np.uint8)
    labels = np.zeros(50_000, np.int32)
    record.keep(tmp_path, {"train": Split("train", [images], labels, range(50_000), ("a", "b"))})
    assert (tmp_path / "data.npz").stat().st_size < 500_000
