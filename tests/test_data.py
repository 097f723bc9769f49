"""Every example exactly once, in an order that (seed, epoch) alone decide, and decoded once."""

import numpy as np
import pytest

from imgcls.data import splits
from imgcls.errors import BadExampleError, UserError


class Numbers:
    """A source whose i-th image is filled with i; some may be unreadable."""

    class_names = ("even", "odd")

    def __init__(self, n, *, bad=(), fingerprint="numbers", label=lambda i: i % 2):
        self.n, self.bad, self.fingerprint, self.label = n, bad, fingerprint, label
        self.ids = range(n)
        self.reads = 0

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.reads += 1
        if i in self.bad:
            raise BadExampleError(f"{i}.png is not an image")
        return {"image": np.full((4, 4, 1), i, np.uint8), "label": self.label(i)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def load(sources, *specs, **options):
    options = {"image_size": (4, 4), "channels": 1, "resize": "squash"} | options
    return splits.load_splits(sources, specs, **options)


def test_split_strings_cut_every_source():
    sources = {"train": Numbers(10), "test": Numbers(4, fingerprint="other")}
    first, last, both = load(sources, "train[:80%]", "train[80%:]", "train[8:]+test")
    assert first.images[:, 0, 0, 0].tolist() == list(range(8))
    assert last.images[:, 0, 0, 0].tolist() == [8, 9]
    assert both.images[:, 0, 0, 0].tolist() == [8, 9, 0, 1, 2, 3]
    assert both.ids == ["train:8", "train:9", "test:0", "test:1", "test:2", "test:3"]


def test_unknown_or_empty_split_is_refused_with_the_sizes():
    sources = {"train": Numbers(10)}
    with pytest.raises(UserError, match=r"'nope'.*train \(10 examples\)"):
        load(sources, "nope")
    for other in ("all[:50%]", "train[:1shard]"):
        with pytest.raises(UserError, match=r"split '.*train \(10 examples\)"):
            load(sources, other)
    with pytest.raises(UserError, match="no examples"):
        load(sources, "train[:1%]")


def test_overlap_is_seen():
    sources = {"train": Numbers(10), "test": Numbers(4)}
    assert splits.overlapping(sources, "train[:50%]", "train[4:6]")
    assert not splits.overlapping(sources, "train[:50%]", "train[50%:]+test")


def test_training_takes_each_example_at_most_once_an_epoch_and_fairly_over_epochs():
    order = splits.TrainOrder(10, batch_size=3, seed=1)
    seen = np.zeros(10, int)
    for epoch in range(200):
        taken = np.concatenate([order[epoch * 3 + i] for i in range(3)])
        assert len(set(taken.tolist())) == 9
        seen[taken] += 1
    assert seen.min() > 150  # an example left out for good would have 0


def test_order_is_a_function_of_seed_and_epoch():
    a, b = (splits.epoch_order(100, seed=1, epoch=3) for _ in range(2))
    assert (a == b).all()
    assert (a != splits.epoch_order(100, seed=1, epoch=4)).any()
    assert (a != splits.epoch_order(100, seed=2, epoch=3)).any()
    # The steps of an epoch can be asked for in any order.
    order = splits.TrainOrder(100, batch_size=10, seed=1)
    last, first = order[39], order[30]
    assert (first == a[:10]).all() and (last == a[90:]).all()


def test_alternating_flip_shows_both_views_of_each_image_in_any_two_epochs():
    order = splits.TrainOrder(100, batch_size=10, seed=1)
    everything = np.arange(100)
    first, second, third = (order.mirrored(everything, step) for step in (9, 10, 20))
    assert 30 < first.sum() < 70
    assert (first != second).all() and (first == third).all()
    assert (order.mirrored(everything[::-1], 0) == first[::-1]).all()
    assert (splits.TrainOrder(100, batch_size=10, seed=2).mirrored(everything, 0) != first).any()


def test_evaluation_takes_each_example_exactly_once():
    (split,) = load({"train": Numbers(10)}, "train")
    batches = [split.read(i) for i in splits.eval_order(10, batch_size=4)]
    assert [len(b["label"]) for b in batches] == [4, 4, 4]
    images = np.concatenate([b["image"][b["mask"]] for b in batches])
    assert images[:, 0, 0, 0].tolist() == list(range(10))
    assert not batches[-1]["image"][2:].any() and not batches[-1]["label"][2:].any()


def test_a_second_load_decodes_nothing():
    load({"train": Numbers(10)}, "train")
    source = Numbers(10)
    (split,) = load({"train": source}, "train")
    assert source.reads == 0 and split.images[7, 0, 0, 0] == 7


def test_the_cache_is_keyed_by_source_size_and_resize():
    load({"train": Numbers(10)}, "train")
    for change in ({"image_size": (2, 2)}, {"resize": "crop"}):
        source = Numbers(10)
        load({"train": source}, "train", **change)
        assert source.reads == 10
    changed = Numbers(10, fingerprint="numbers, touched")
    load({"train": changed}, "train")
    assert changed.reads == 10


def test_a_truncated_cache_is_decoded_again(tmp_path):
    load({"train": Numbers(10)}, "train")
    (images,) = tmp_path.rglob("images.npy")
    images.write_bytes(images.read_bytes()[:-5])
    source = Numbers(10)
    (split,) = load({"train": source}, "train")
    assert source.reads == 10 and split.images[9, 0, 0, 0] == 9


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (split,) = load({"train": Numbers(10)}, "train")
    assert len(split) == 10


def test_unreadable_examples_are_listed_or_skipped_up_to_the_limit():
    with pytest.raises(UserError, match=r"2 unreadable.*3\.png is not.*5\.png.*skip_bad=2"):
        load({"train": Numbers(10, bad=(3, 5))}, "train", skip_bad=1)
    for _ in range(2):  # decoded, then from the cache
        (split,) = load({"train": Numbers(10, bad=(3, 5))}, "train", skip_bad=2)
        assert split.ids[3] == "train:4" and split.images[3, 0, 0, 0] == 4
        assert len(split) == len(split.labels) == len(split.ids) == 8
    with pytest.raises(UserError, match="2 unreadable"):
        load({"train": Numbers(10, bad=(3, 5))}, "train", skip_bad=1)


def test_a_label_out_of_range_names_the_example():
    with pytest.raises(UserError, match=r"example 7 .*label 2, outside 0\.\.1"):
        load({"train": Numbers(10, label=lambda i: 2 if i == 7 else 0)}, "train")
    with pytest.raises(UserError, match="label -1"):
        load({"train": Numbers(10, fingerprint="x", label=lambda i: -(i == 7))}, "train")


def test_more_than_the_memory_is_refused_before_it_is_read():
    source = Numbers(10**9)
    with pytest.raises(UserError, match=r"need \d+\.\d GiB.*free.*image_size"):
        load({"train": source}, "train", image_size=(1000, 1000))
    assert source.reads == 0
