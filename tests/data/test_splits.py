"""Every example exactly once, in an order that (seed, epoch) alone decide, and decoded once."""

import numpy as np
import pytest

from imgcls.data import order as orders
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


def numbers(split):
    """The numbers of the source's examples, as their images show them."""
    return split.read(np.arange(len(split)))["image"][:, 0, 0, 0].tolist()


def load(sources, *specs, **options):
    options = {"image_size": (4, 4), "channels": 1, "resize": "squash"} | options
    return splits.load_splits(sources, specs, **options)


def test_split_strings_cut_every_source():
    sources = {"train": Numbers(10), "test": Numbers(4, fingerprint="other")}
    first, last, both = load(sources, "train[:80%]", "train[80%:]", "train[8:]+test")
    assert numbers(first) == list(range(8))
    assert numbers(last) == [8, 9]
    assert numbers(both) == [8, 9, 0, 1, 2, 3]
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
    for a, b in (("train[:50%]", "train[50%:]+test"), ("train[9:]+test[:2]", "test[2:]+train[:9]")):
        splits.check_disjoint(sources, {"a": a, "b": b})
    for a, b in (("train[:50%]", "train[4:6]"), ("test", "test"), ("train[9:]", "test+train")):
        with pytest.raises(UserError) as refused:
            splits.check_disjoint(sources, {"a": a, "b": b})
        assert str(refused.value) == f"b={b!r} shares examples with a={a!r}"
    for twice in ("test[:2]+test[:2]", "train+test[1:]+train[9:]", "train[:6]+train[5:]"):
        with pytest.raises(UserError) as refused:
            splits.check_disjoint(sources, {"a": twice})
        assert str(refused.value) == f"a={twice!r} shares examples with itself"


def test_training_takes_each_example_at_most_once_an_epoch_and_fairly_over_epochs():
    order = orders.TrainOrder(10, batch_size=3, seed=1)
    seen = np.zeros(10, int)
    for epoch in range(200):
        taken = np.concatenate([order[epoch * 3 + i] for i in range(3)])
        assert len(set(taken.tolist())) == 9
        seen[taken] += 1
    assert seen.min() > 150  # an example left out for good would have 0


def test_order_is_a_function_of_seed_and_epoch():
    a, b = (orders.epoch_order(100, seed=1, epoch=3) for _ in range(2))
    assert (a == b).all()
    assert (a != orders.epoch_order(100, seed=1, epoch=4)).any()
    assert (a != orders.epoch_order(100, seed=2, epoch=3)).any()
    # The steps of an epoch can be asked for in any order.
    order = orders.TrainOrder(100, batch_size=10, seed=1)
    last, first = order[39], order[30]
    assert (first == a[:10]).all() and (last == a[90:]).all()


def test_order_and_flips_are_those_of_earlier_versions():
    """Else a run that one of them began would go on with other examples."""
    order = orders.TrainOrder(6, batch_size=3, seed=3 * 2**32 + 1_000_003)
    assert [order[step].tolist() for step in (0, 3)] == [[4, 3, 2], [1, 5, 0]]
    assert order.mirrored(np.arange(6), 4).tolist() == [False, True, False, True, False, True]


def test_alternating_flip_shows_both_views_of_each_image_in_any_two_epochs():
    order = orders.TrainOrder(100, batch_size=10, seed=1)
    everything = np.arange(100)
    first, second, third = (order.mirrored(everything, step) for step in (9, 10, 20))
    assert 35 < first.sum() < 65
    assert (first != second).all() and (first == third).all()
    assert (order.mirrored(everything[::-1], 0) == first[::-1]).all()
    assert (orders.TrainOrder(100, batch_size=10, seed=2).mirrored(everything, 0) != first).any()


def test_evaluation_takes_each_example_exactly_once():
    sources = {"train": Numbers(10), "test": Numbers(4, fingerprint="other")}
    for spec, expected in (("train", [*range(10)]), ("test[2:]+train[:8]", [2, 3, *range(8)])):
        (split,) = load(sources, spec)
        batches = [split.read(i) for i in orders.eval_order(10, batch_size=4)]
        assert [len(b["label"]) for b in batches] == [4, 4, 4]
        images, labels = (
            np.concatenate([b[key][b["mask"]] for b in batches]) for key in ("image", "label")
        )
        assert images[:, 0, 0, 0].tolist() == expected
        assert labels.tolist() == [i % 2 for i in expected] and labels.dtype == np.int32
        assert not batches[-1]["image"][2:].any() and not batches[-1]["label"][2:].any()


def test_a_second_load_decodes_nothing():
    load({"train": Numbers(10)}, "train")
    source = Numbers(10)
    (split,) = load({"train": source}, "train")
    assert source.reads == 0 and numbers(split) == list(range(10))


def test_labels_may_be_vectors():
    for _ in range(2):  # decoded, then from the cache
        sources = {"train": Numbers(10, label=lambda i: [i / 2, 1 - i, 0.5])}
        (split,) = load(sources, "train[5:]")
        batch = split.read(np.array([4, -1]))
        assert batch["label"].dtype == np.float32
        assert batch["label"].tolist() == [[4.5, -8, 0.5], [0, 0, 0]]


def test_the_fingerprint_is_that_of_the_content_however_it_came_here(tmp_path):
    def fingerprint(spec="train", **changed):
        (split,) = load({"train": Numbers(10, **changed)}, spec)
        return split.fingerprint

    first = fingerprint()
    assert first == fingerprint() == fingerprint("train[:4]+train[4:]")
    assert first == fingerprint(fingerprint="other files of the same content")
    (split,) = load({"train": Numbers(10)}, "train")
    images, labels = (split.read(np.arange(10))[key] for key in ("image", "label"))
    assert splits.Split("x", [images], labels, split.ids, split.class_names).fingerprint == first
    others = [
        fingerprint("train[:9]"),
        fingerprint("train[5:]+train[:5]"),
        fingerprint(fingerprint="another label", label=lambda i: i % 2 ^ (i == 3)),
        splits.Split("x", [images ^ 1], labels, split.ids, split.class_names).fingerprint,
        splits.Split("x", [images], labels, range(10), split.class_names).fingerprint,
        splits.Split(
            "x", [images.reshape(10, 2, 8, 1)], labels, split.ids, split.class_names
        ).fingerprint,
    ]
    assert len({first, *others}) == 1 + len(others)


def test_the_cache_is_keyed_by_source_size_and_resize():
    load({"train": Numbers(10)}, "train")
    for change in ({"image_size": (2, 2)}, {"resize": "crop"}):
        source = Numbers(10)
        load({"train": source}, "train", **change)
        assert source.reads == 10
    changed = Numbers(10, fingerprint="numbers, touched")
    load({"train": changed}, "train")
    assert changed.reads == 10


def test_unreadable_examples_are_listed_or_skipped_up_to_the_limit():
    with pytest.raises(UserError, match=r"2 unreadable.*3\.png is not.*5\.png.*skip_bad=2"):
        load({"train": Numbers(10, bad=(3, 5))}, "train", skip_bad=1)
    for _ in range(2):  # decoded, then from the cache
        (split,) = load({"train": Numbers(10, bad=(3, 5))}, "train", skip_bad=2)
        assert split.ids[3] == "train:4" and numbers(split) == [0, 1, 2, 4, 6, 7, 8, 9]
        assert len(split) == len(split.labels) == len(split.ids) == 8
        halves = load({"train": Numbers(10, bad=(3, 5))}, "train[:5]", "train[5:]", skip_bad=2)
        assert [numbers(half) for half in halves] == [[0, 1, 2, 4], [6, 7, 8, 9]]
    with pytest.raises(UserError, match="2 unreadable"):
        load({"train": Numbers(10, bad=(3, 5))}, "train", skip_bad=1)


def test_a_mended_example_moves_no_other_over_a_border():
    specs = ("train[:50%]", "train[50%:80%]", "train[-20%:]")
    whole = load({"train": Numbers(100)}, *specs)
    for bad in ((0,), (49, 50), (10, 79, 80, 99)):
        broken = Numbers(100, bad=bad, fingerprint=f"without {bad}")
        broken = load({"train": broken}, *specs, skip_bad=9)
        for before, after in zip(broken, whole):
            assert numbers(before) == [n for n in numbers(after) if n not in bad]


def test_a_split_without_readable_examples_is_refused():
    with pytest.raises(UserError, match=r"'train\[:2\]' has no readable example"):
        load({"train": Numbers(10, bad=(0, 1))}, "train[:2]", skip_bad=2)
    (split,) = load({"train": Numbers(10, bad=(0, 1))}, "train[8:]+train[:2]", skip_bad=2)
    assert numbers(split) == [8, 9] and split.labels.dtype == np.int32


def test_a_label_out_of_range_names_the_example():
    with pytest.raises(UserError, match=r"example 7 .*label 2, outside 0\.\.1"):
        load({"train": Numbers(10, label=lambda i: 2 if i == 7 else 0)}, "train")
    with pytest.raises(UserError, match="label -1"):
        load({"train": Numbers(10, fingerprint="x", label=lambda i: -(i == 7))}, "train")


def test_more_than_the_memory_is_refused_before_it_is_read():
    source = Numbers(10**9)
    with pytest.raises(UserError, match=r"need \d+\.\d GiB.*free.*image_size.*train\[:10%\]"):
        load({"train": source}, "train", image_size=(1000, 1000))
    assert source.reads == 0
    # The advice is one: a part needs less.
    (split,) = load({"train": source}, "train[:3]", image_size=(1000, 1000))
    assert numbers(split) == [0, 1, 2] and source.reads == 3


CROPS = ("crop", "crop-bicubic")


class Wide(Numbers):
    """Its pictures are 8 high and 20 wide, and each pixel has the number of its column."""

    def __getitem__(self, i):
        columns = np.arange(20, dtype=np.uint8) + i
        return super().__getitem__(i) | {"image": np.tile(columns[:, None], (8, 1, 1))}


def test_pictures_are_those_of_the_source_as_far_as_they_are_used():
    sources = {"train": Wide(6, bad=(1,)), "test": Wide(3, fingerprint="other")}
    options = {"skip_bad": 1, "image_size": (4, 6)}
    for resize, columns in (("squash", range(20)), *((c, range(4, 16)) for c in CROPS)):
        (split,) = load(sources, "train+test[1:]", resize=resize, **options)
        assert split.ids == ["train:0", *(f"train:{i}" for i in range(2, 6)), "test:1", "test:2"]
        for row, i in enumerate([0, 2, 3, 4, 5, 1, 2]):
            picture = split.picture(row)
            assert picture.shape == (8, len(columns), 1)
            assert picture[3, :, 0].tolist() == [i + column for column in columns]


def test_a_picture_that_is_gone_is_shown_as_it_was_decoded():
    source = Numbers(4)
    (split,) = load({"train": source}, "train", image_size=(2, 2))
    assert split.picture(3).shape == (4, 4, 1)
    source.bad = (3,)
    np.testing.assert_array_equal(split.picture(3), np.full((2, 2, 1), 3))
