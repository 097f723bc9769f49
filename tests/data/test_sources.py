import logging
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgcls.data.sources import open_sources
from imgcls.errors import BadExampleError, UserError


def open_folder(root, **options):
    return open_sources("image_folder", data_dir=str(root), **{"channels": 3} | options)


def make_folder(root: Path, counts: dict[str, int]) -> Path:
    """Writes `counts[folder]` pictures into each folder, all different."""
    for place, (folder, count) in enumerate(counts.items()):
        (root / folder).mkdir(parents=True)
        for number in range(count):
            picture = np.full((4, 5, 3), (place, number // 256, number % 256), np.uint8)
            Image.fromarray(picture).save(root / folder / f"{number}.png")
    return root


def refusal(call, *words) -> str:
    """Checks that a call is refused in one line that has all of the words."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in text and text.isprintable()
    assert not [word for word in words if word not in text], text
    return text


def content(source) -> list[tuple[bytes, int]]:
    examples = [source[i] for i in range(len(source))]
    return [(example["image"].tobytes(), example["label"]) for example in examples]


# Digits


def test_digits_have_a_fixed_stratified_fifth_for_test():
    from sklearn.datasets import load_digits

    sources = open_sources("digits", data_dir=None, channels=1)
    assert {name: len(source) for name, source in sources.items()} == {"train": 1437, "test": 360}
    both = sorted(int(i) for source in sources.values() for i in source.ids)
    assert both == list(range(1797))
    test = [sources["test"][i]["label"] for i in range(360)]
    assert np.abs(np.bincount(load_digits().target) / 5 - np.bincount(test)).max() < 1
    again = open_sources("digits", data_dir=None, channels=1)
    assert again["test"].fingerprint == sources["test"].fingerprint


def test_digits_are_scaled_to_all_of_uint8():
    from sklearn.datasets import load_digits

    source = open_sources("digits", data_dir=None, channels=3)["train"]
    for place in (0, 700, -1):
        image = source[place]["image"]
        assert image.dtype == np.uint8 and image.shape == (8, 8, 3)
        original = load_digits().images[int(source.ids[place])]
        for channel in range(3):
            np.testing.assert_allclose(image[..., channel], original * 255 / 16, atol=0.5)
        assert source[place]["label"] == load_digits().target[int(source.ids[place])]


# Folders


def test_flat_layout_is_split_by_class_and_every_file_is_in_one_split(tmp_path):
    counts = {"cat": 100, "dog": 31, "emu": 3, "fox": 1}
    sources = open_folder(make_folder(tmp_path, counts))
    assert list(sources) == ["train", "validation", "test"]
    expected = {
        "train": {"cat": 80, "dog": 25, "emu": 1, "fox": 1},
        "validation": {"cat": 10, "dog": 3, "emu": 1},
        "test": {"cat": 10, "dog": 3, "emu": 1},
    }
    for name, source in sources.items():
        assert source.class_names == ("cat", "dog", "emu", "fox")
        assert Counter(path.split("/")[0] for path in source.ids) == expected[name]
    every = sorted(path for source in sources.values() for path in source.ids)
    assert every == sorted(f"{name}/{i}.png" for name, n in counts.items() for i in range(n))


def test_an_example_is_the_picture_of_its_id_and_the_class_of_its_folder(tmp_path):
    make_folder(tmp_path, {"b/deep/er": 5, "a": 7})
    for source in open_folder(tmp_path).values():
        for place, path in enumerate(source.ids):
            np.testing.assert_array_equal(
                source[place]["image"], np.asarray(Image.open(tmp_path / path))
            )
            assert source.class_names[source[place]["label"]] == path.split("/")[0]
    assert open_folder(tmp_path, channels=1)["train"][0]["image"].shape == (4, 5, 1)


def test_examples_are_mixed_not_sorted_by_class(tmp_path):
    source = open_folder(make_folder(tmp_path, {"a": 100, "b": 100}))["train"]
    half = [source[i]["label"] for i in range(len(source) // 2)]
    assert 25 < sum(half) < 55


def test_splits_and_order_do_not_depend_on_listing_order_or_place(tmp_path, monkeypatch):
    make_folder(tmp_path / "here", {"a": 20, "b": 15, "c": 9})
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    expected = open_folder(tmp_path / "here")
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: list(scandir(path))[::-1])
    for root in ("here", "there"):
        for name, source in open_folder(tmp_path / root).items():
            assert source.ids == expected[name].ids
            assert source.class_names == expected[name].class_names
            assert content(source) == content(expected[name])


def test_a_new_class_does_not_reorder_the_others(tmp_path):
    make_folder(tmp_path, {"a": 20, "b": 20})
    before = open_folder(tmp_path)["train"].ids
    make_folder(tmp_path, {"c": 20})
    after = [path for path in open_folder(tmp_path)["train"].ids if not path.startswith("c")]
    assert after == list(before)


SAME = {"cat": 12, "dog": 12}


@pytest.mark.parametrize("validation", ["validation", "val", "valid"])
def test_split_layout_is_taken_as_it_is(validation, tmp_path):
    counts = {"train/a": 9, "train/b": 8, f"{validation}/b": 2, f"{validation}/a": 1, "test/b": 4}
    sources = open_folder(make_folder(tmp_path, counts | {"test/a": 1}))
    lengths = {name: len(source) for name, source in sources.items()}
    assert lengths == {"train": 17, "validation": 3, "test": 5}
    assert all(path.startswith(validation) for path in sources["validation"].ids)
    assert {source.class_names for source in sources.values()} == {("a", "b")}


def test_validation_is_carved_from_train_where_there_is_none(tmp_path):
    counts = {"train/a": 50, "train/b": 20, "test/a": 1, "test/b": 1}
    sources = open_folder(make_folder(tmp_path, counts))
    classes = Counter(path.split("/")[1] for path in sources["validation"].ids)
    assert classes == {"a": 5, "b": 2}
    assert len(sources["train"]) == 63 and len(sources["test"]) == 2
    assert not set(sources["train"].ids) & set(sources["validation"].ids)


def spread(*folders: str) -> dict[str, int]:
    """Two classes of 12 pictures in each folder of splits."""
    return {f"{folder}/{name}": 12 for folder in folders for name in ("cat", "dog")}


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("Training", None, "Testing"),
        ("training_set", None, "test_set"),
        ("Train", "Val", "Test"),
        ("TRAIN", "valid", "test"),
        ("train-images", "validation-images", "test-images"),
        ("trainset", "devset", "testset"),
        ("images_train", "images_val", "images_test"),
        ("seg_train/seg_train", None, "seg_test/seg_test"),
        ("chest_xray/train", "chest_xray/val", "chest_xray/test"),
        ("archive/data/Training Data", None, "archive/data/Test Data"),
        ("train/images", "val/images", "test/images"),
        ("train2017", "val2017", "test2017"),
        ("birds_train_450", "birds_valid_450", "birds_test_450"),
    ],
)
def test_splits_are_known_by_other_names_and_below_other_folders(train, validation, test, tmp_path):
    folders = {"train": train, "validation": validation, "test": test}
    given = {split: folder for split, folder in folders.items() if folder}
    sources = open_folder(make_folder(tmp_path, spread(*given.values())))
    assert sources.keys() == folders.keys()
    assert all(source.class_names == ("cat", "dog") for source in sources.values())
    for split, folder in given.items():
        assert all(path.startswith(f"{folder}/") for path in sources[split].ids)
    assert len(sources["test"]) == 24


@pytest.mark.parametrize(
    ("counts", "words", "ignore"),
    [
        (spread("train", "val", "test", "docs"), ["docs", "ignore=docs", "test was"], "docs"),
        (spread("train", "test") | {"notes": 1, "a b": 1}, ["ignore=a b,notes"], "a b, notes"),
        (spread("train") | {"docs": 3}, ["train was taken", "docs"], "docs"),
        (spread("chest/train", "chest/test", "chest/chest/train"), ["ignore=chest"], ""),
        (spread("seg_train", "seg_test") | {"seg_pred": 9}, ["seg_pred"], "seg_pred"),
        (spread("rps", "rps-test-set", "validation"), ["no split is rps, rps-test-set;"], ""),
        (spread("2019", "2020", "2021"), ["2019, 2020, 2021", "most hold the same folders"], ""),
        (spread("amazon/images", "dslr/images", "webcam/images"), ["amazon", "cat, dog"], ""),
        (spread("cat", "dog"), ["cat, dog"], ""),
        (spread("val", "test"), ["none for train"], ""),
        (spread("data/train", "data/test") | {"docs": 3}, ["in data", "data.dir"], "docs"),
        (spread("Train", "train1", "test"), ["two train folders", "train1 was"], "train1"),
        (spread("train", "test") | {"labels": 0}, ["labels"], "labels"),
        (spread("train", "val") | {"test": 9}, ["9 pictures", "ignore=test"], "test"),
        (spread("train", "val") | {"test/unknown": 9}, ["9 pictures", "ignore=test"], "test"),
        ({"train": 9, "test": 9}, ["in train 9 pictures beside each other"], ""),
        ({"cat": 9, "dog": 9, "Test": 9}, ["Test was taken for test", "ignore=Test"], "Test"),
        (SAME | spread("both"), ["both holds the same folders again", "data.dir"], "both"),
        ({"images": 9, "masks": 9}, ["parts of a set"], ""),
        ({"HAM_images_part_1": 9, "HAM_images_part_2": 9}, ["parts of a set"], ""),
        ({"images_001/images": 9, "images_002/images": 9}, ["parts of a set"], ""),
        ({"trainA": 9, "trainB": 9, "testA": 9, "testB": 9}, ["parts of a set"], ""),
        ({"cat_train": 9, "cat_test": 9, "dog_train": 9, "dog_test": 9}, ["parts of a set"], ""),
        ({".": 24}, ["24 pictures beside each other, no class folders"], ""),
        ({"a": 4, "b": 4, "..": 9}, ["9 pictures in no class folder"], ""),
    ],
)
def test_what_may_be_a_split_or_not_is_refused_and_left_out_on_request(
    counts, words, ignore, tmp_path
):
    root = tmp_path / "root"
    make_folder(root, {"": 0})
    for folder, count in counts.items():
        place = root if folder in (".", "..") else root / folder
        place.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new("RGB", (4, 5), (number, 0, 0)).save(place / f"{number}.png")
    refusal(lambda: open_folder(root), str(root), *words)
    if ignore:
        for source in open_folder(root, ignore=ignore).values():
            assert source.class_names == ("cat", "dog")


@pytest.mark.parametrize(
    "names",
    [
        "valid invalid",
        "grade_1 grade_2",
        "train plane",
        "mask no_mask",
        "sunset1 sunset2",
        "train train_station contest",
    ],
)
def test_names_like_those_of_splits_and_parts_may_be_classes(names, tmp_path):
    source = open_folder(make_folder(tmp_path, dict.fromkeys(names.split(), 9)))["train"]
    assert source.class_names == tuple(sorted(names.split()))


def test_a_folder_to_leave_out_must_be_there(tmp_path):
    make_folder(tmp_path, {"a": 9, "b": 9, "a/raw": 3, "Docs": 3, ".git": 3})
    sources = open_folder(tmp_path, ignore="raw,Docs/, .git,")
    assert sum(map(len, sources.values())) == 18
    refusal(lambda: open_folder(tmp_path, ignore="raw,rwa"), "data.ignore", "no folder rwa")
    refusal(lambda: open_folder(tmp_path, ignore="docs"), "no folder docs: did you mean Docs?")


def test_options_of_folders_are_refused_where_they_would_do_nothing(tmp_path):
    for name in ("digits", f"hf:{tmp_path}", "mnist"):
        for options in ({"group": "[0-9]"}, {"ignore": "a"}, {"split_duplicates": "train"}):
            call = lambda name=name, o=options: open_sources(name, data_dir=None, channels=1, **o)
            refusal(call, f"config.data.{next(iter(options))}", f"unset it for {name}")
    plain = {"group": "", "ignore": "", "split_duplicates": "warn", "follow_links": False}
    open_sources("digits", data_dir=None, channels=1, **plain)


def test_validation_without_test_is_the_test_split_and_a_line_says_so(tmp_path):
    sources = open_folder(make_folder(tmp_path, spread("train", "val")))
    assert {name: len(s) for name, s in sources.items()} == {
        "train": 22,
        "test": 24,
        "validation": 2,
    }
    assert all(path.startswith("val/") for path in sources["test"].ids)
    assert all(path.startswith("train/") for path in sources["validation"].ids)
    assert [line for line in sources["train"].describe() if "val is the test split" in line]


def test_what_is_no_picture_is_left_out_with_a_count_and_moves_none(tmp_path):
    make_folder(tmp_path, {"a": 30, "b": 30})
    before = open_folder(tmp_path)
    for number in range(30):
        (tmp_path / "a" / f"{number}.json").write_text("{}")
        make_folder(tmp_path, {f"a/@eaDir/{number}.png": 1})
    make_folder(tmp_path, {"__MACOSX/a": 2, "b/.thumbnails": 2, "b/.ipynb_checkpoints": 2})
    for name in ("a/notes.TXT", "b/b.xml", "b/README", "LICENSE", "labels.csv", "clip.mp4"):
        (tmp_path / name).write_text("x")
    after = open_folder(tmp_path)
    for name, source in after.items():
        assert source.ids == before[name].ids and source.fingerprint == before[name].fingerprint
    (line,) = (line for line in after["train"].describe() if "left out" in line)
    for word in ("30 .json", "1 @eaDir/", "1 __MACOSX/", "1 .txt", "1 .xml", "1 .csv", "1 .mp4"):
        assert word in line
    assert "pictures of 5x4 to 5x4, median 5x4" in after["train"].describe()


def test_masks_beside_their_pictures_are_left_out_and_pictures_named_like_them_are_not(tmp_path):
    make_folder(tmp_path, {"benign": 20, "with_mask": 20})
    before = open_folder(tmp_path)
    for number in range(20):
        picture = (tmp_path / "benign" / f"{number}.png").read_bytes()
        for name in (f"{number}_mask.png", f"{number}_mask_1.png", f"{number}_Segmentation.PNG"):
            (tmp_path / "benign" / name).write_bytes(picture)
    after = open_folder(tmp_path)
    assert {k: x.fingerprint for k, x in after.items()} == {
        k: x.fingerprint for k, x in before.items()
    }
    assert "left out: 60 masks beside their pictures" in after["train"].describe()
    for number in range(20):
        (tmp_path / "with_mask" / f"{number}.png").rename(
            tmp_path / "with_mask" / f"with_mask_{number}.png"
        )
    assert sum(map(len, open_folder(tmp_path).values())) == 40


def photographs(count: int, seed: int = 0) -> list[Image.Image]:
    """Smooth pictures, all different."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 6, 8, 3), np.uint8)
    return [Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC) for pixels in coarse]


def test_near_duplicates_stay_in_train_on_request(tmp_path, monkeypatch):
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        for number, picture in enumerate(photographs(30, seed)):
            picture.save(tmp_path / name / f"{number}.png")
            if number % 2:
                picture.resize((40, 30)).save(tmp_path / name / f"copy of {number}.jpg", quality=60)
    (tmp_path / "a" / "torn.jpg").write_bytes(b"x")
    before = open_folder(tmp_path)

    def torn(sources) -> int:
        places = {}
        for name, source in sources.items():
            for path in source.ids:
                key = path.replace("copy of ", "").partition(".")[0]
                places.setdefault(key, set()).add(name)
        return sum(len(found) > 1 for found in places.values())

    after = open_folder(tmp_path, split_duplicates="train")
    assert torn(before) > 0 == torn(after)
    assert sum(map(len, after.values())) == 91
    assert min(map(len, after.values())) > 0
    assert set(before["train"].ids) <= set(after["train"].ids)
    assert any("near-duplicates are in train" in line for line in after["test"].describe())
    read = []
    refuse = lambda path, **_: read.append(path) or (_ for _ in ()).throw(BadExampleError("torn"))
    monkeypatch.setattr("imgcls.data.folder.decode_image", refuse)
    again = open_folder(tmp_path, split_duplicates="train")
    assert {k: s.ids for k, s in again.items()} == {k: s.ids for k, s in after.items()}
    assert [Path(path).name for path in read] == ["torn.jpg"]
    monkeypatch.undo()
    given = make_folder(
        tmp_path / "given", {f"{s}/{c}": 9 for s in ("train", "test") for c in "ab"}
    )
    assert len(open_folder(given, split_duplicates="train")["test"]) == 18


def test_copies_of_one_picture_leave_no_class_empty(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        for number, picture in enumerate(photographs(20, seed)):
            picture.save(tmp_path / name / f"{number}.png")
    (tmp_path / "rare").mkdir()
    for number in range(4):
        photographs(1, 2)[0].save(tmp_path / "rare" / f"{number}.png")
    sources = open_folder(tmp_path, split_duplicates="train")
    rare = {k: sum(path.startswith("rare") for path in s.ids) for k, s in sources.items()}
    assert rare == {"train": 4, "validation": 0, "test": 0}
    for name in "ab":
        shutil.rmtree(tmp_path / name)
        shutil.copytree(tmp_path / "rare", tmp_path / name)
    refusal(lambda: open_folder(tmp_path, split_duplicates="train"), "one is empty", "=warn")


def test_near_duplicates_take_their_groups_with_them(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        pictures = photographs(40, seed)
        if name == "a":  # each patient shares a picture with another
            pictures[4::8] = pictures[::8]
        for number, picture in enumerate(pictures):
            picture.save(tmp_path / name / f"{name}{number // 4}_{number}.png")
    sources = open_folder(tmp_path, group="[ab][0-9]+(?=_)", split_duplicates="train")
    people = {k: {path.split("_")[0] for path in s.ids} for k, s in sources.items()}
    assert len(people["train"]) == 18 and {*people["test"], *people["validation"]} < {
        f"b/b{number}" for number in range(10)
    }
    assert sum(map(len, people.values())) == 20
    assert "20 groups, 0 of them in several splits" in sources["train"].describe()


@pytest.mark.parametrize("group", ["patient[0-9]+", "_(patient[0-9]+)_"])
def test_files_of_a_group_come_into_one_split(group, tmp_path):
    counts = {"ill": 120, "well": 80, "rare": 2}
    make_folder(tmp_path, counts)
    for name, count in counts.items():
        for number in range(count):
            where = tmp_path / name / f"{number}.png"
            where.rename(where.with_name(f"scan_patient{number % 40}_{number}.png"))
    sources = open_folder(tmp_path, group=group)
    people = {k: {path.split("_")[1] for path in s.ids} for k, s in sources.items()}
    assert not people["train"] & people["test"] and not people["test"] & people["validation"]
    assert not people["train"] & people["validation"]
    for name in ("validation", "test"):
        found = Counter(path.split("/")[0] for path in sources[name].ids)
        assert 12 <= found["ill"] <= 15 and 8 <= found["well"] <= 10
    assert sum(map(len, sources.values())) == 202
    assert any("40 groups, 0 of them in several" in line for line in sources["train"].describe())
    again = open_folder(tmp_path, group=group)
    assert all(again[name].ids == source.ids for name, source in sources.items())


def test_groups_too_large_to_divide_are_refused(tmp_path):
    make_folder(tmp_path, {"a": 9, "b": 9})
    refusal(lambda: open_folder(tmp_path, group="[ab]/"), "config.data.group", "2 groups")


def test_groups_that_no_path_or_not_every_path_tells_are_told(tmp_path):
    make_folder(tmp_path, {"a": 20, "b": 20, "caf\u00e9": 9})
    for group in ("Patient[0-9]+", "(Patient)?"):
        refusal(lambda g=group: open_folder(tmp_path, group=g), "data.group", "0 groups", ".png")
    lines = open_folder(tmp_path, group="[5-9].png")["train"].describe()
    assert "25 pictures of no group" in lines
    (tmp_path / "caf\u00e9").rename(tmp_path / "cafe\u0301")
    lines = open_folder(tmp_path, group="caf\u00e9|[ab]/[0-9]+")["train"].describe()
    assert "41 groups, 0 of them in several splits" in lines


def test_groups_that_given_splits_tear_are_counted(tmp_path):
    make_folder(tmp_path, {f"{split}/{name}": 9 for split in ("train", "test") for name in "ab"})
    sources = open_folder(tmp_path, group="[0-9]+")
    assert any("9 groups, 9 of them in several" in line for line in sources["train"].describe())


def test_nested_folders_belong_to_the_class_on_top_and_a_line_says_how_deep(tmp_path):
    make_folder(tmp_path, {"a": 5, "b": 5, "b/x/y": 5})
    sources = open_folder(tmp_path)
    assert sources["train"].class_names == ("a", "b")
    assert [line for line in sources["test"].describe() if "2 deep" in line]


def test_unicode_normal_forms_of_a_name_are_one_class(tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"
    before = open_folder(make_folder(tmp_path / "linux", {composed: 20, "b": 20}))
    make_folder(tmp_path / "mac", {apart: 20, "b": 20})
    shutil.rmtree(tmp_path / "mac" / apart)
    shutil.copytree(tmp_path / "linux" / composed, tmp_path / "mac" / apart)
    for name, source in open_folder(tmp_path / "mac").items():
        assert source.class_names == ("b", composed) and source.ids == before[name].ids
        assert content(source) == content(before[name])
    shutil.copytree(tmp_path / "linux" / composed, tmp_path / "mac" / composed)
    both = open_folder(tmp_path / "mac")
    every = [path for source in both.values() for path in source.ids]
    assert len(set(every)) == len(every) == 60
    assert both["test"].class_names == ("b", composed)
    split = spread("train") | {f"train/{composed}": 9, f"test/{apart}": 2, "test/cat": 2}
    assert len(open_folder(make_folder(tmp_path / "splits", split))["test"]) == 4


def test_a_folder_named_train_among_classes_is_a_class(tmp_path):
    source = open_folder(make_folder(tmp_path, {"train": 9, "plane": 9}))["train"]
    assert source.class_names == ("plane", "train")


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({}, ["holds no images", "PATH/<class>/*"]),
        ({"a": 0, "b": 0}, ["holds no images"]),
        ({"a": 9}, ["a 7", "two classes"]),
        ({"a": 9, "b": 0}, ["a 7", "b 0", "fill or remove"]),
        ({"a": 2, "b": 2}, ["no images", "validation"]),
        ({"train/a": 9, "train/b": 9, "test/a": 0, "test/b": 2}, ["a 0", "test", "fill or remove"]),
        ({"train/a": 9, "train/b": 9, "test": 0}, ["in test", "no images"]),
        ({"train/a": 9, "train/b": 9, "test/c": 3}, ["c 3", "train has no class c"]),
        ({"train/a": 9, "test/a": 3}, ["two classes"]),
        ({"train/a": 9, "val/a": 9, "valid/a": 9}, ["two validation folders"]),
    ],
)
def test_folders_nobody_can_train_on_are_refused_with_the_counts(counts, words, tmp_path):
    refusal(lambda: open_folder(make_folder(tmp_path, counts)), str(tmp_path), *words)


@pytest.mark.parametrize("options", [{}, {"group": "[0-9]"}, {"split_duplicates": "train"}])
def test_class_folders_without_pictures_are_refused_whatever_is_wanted(options, tmp_path):
    flat = make_folder(tmp_path / "flat", {"a": 0, "b": 0})
    Image.new("RGB", (4, 5)).save(flat / "0.png")
    refusal(lambda: open_folder(flat, **options), "1 pictures in no class folder and 0 in such")
    counts = {"train/a": 0, "train/b": 0, "test/a": 3, "test/b": 3}
    split = make_folder(tmp_path / "split", counts)
    refusal(lambda: open_folder(split, **options), "a 0, b 0")


def test_a_missing_or_unnamed_folder_is_refused(tmp_path):
    refusal(lambda: open_folder(tmp_path / "gone"), str(tmp_path / "gone"), "--config.data.dir")
    (tmp_path / "file").touch()
    refusal(lambda: open_folder(tmp_path / "file"), "not a directory")
    refusal(
        lambda: open_sources("image_folder", data_dir=None, channels=3), "--config.data.dir=PATH"
    )


def test_a_training_class_missing_from_test_is_a_warning(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))
    lacking = {f"train/b{number}": 9 for number in range(30)}
    open_folder(make_folder(tmp_path, {"train/a": 9, "test/a": 3} | lacking))
    assert len(warnings) == 1 and "test has no image of class b0, b1, b10" in warnings[0]
    assert warnings[0].endswith(" and 10 more")


def test_hidden_files_and_those_of_desktops_and_other_kinds_are_no_examples(tmp_path):
    make_folder(tmp_path, {"a": 5, "b": 5})
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png"):
        (tmp_path / "a" / name).write_text("x")
    make_folder(tmp_path, {".git": 3, "a/.cache": 3})
    (tmp_path / "README.txt").write_text("beside the classes")
    (tmp_path / "b" / "notes.txt").write_text("in a class")
    os.mkfifo(tmp_path / "b" / "pipe.png")
    every = {path for source in open_folder(tmp_path).values() for path in source.ids}
    images = {f"{name}/{number}.png" for name in "ab" for number in range(5)}
    assert every == images


def test_an_unreadable_file_is_named_when_it_is_read(tmp_path):
    make_folder(tmp_path, {"a": 5, "b": 5})
    (tmp_path / "a/text.jpg").write_text("a text")
    (tmp_path / "a/empty.png").touch()
    (tmp_path / "a/nowhere.png").symlink_to("nothing")
    sources = open_folder(tmp_path)
    for name in ("text.jpg", "empty.png", "nowhere.png"):
        (source,) = [source for source in sources.values() if f"a/{name}" in source.ids]
        with pytest.raises(BadExampleError, match=name):
            source[source.ids.index(f"a/{name}")]


def test_links_to_files_and_folders_are_followed_or_all_refused(tmp_path):
    make_folder(tmp_path / "real", {"a": 9, "b": 9})
    linked = tmp_path / "linked"
    (linked / "a").mkdir(parents=True)
    for number in range(9):
        (linked / "a" / f"{number}.png").symlink_to(tmp_path / "real" / "a" / f"{number}.png")
    (linked / "b").symlink_to(tmp_path / "real" / "b")
    expected = open_folder(tmp_path / "real", follow_links=False)
    for name, source in open_folder(linked).items():
        assert source.ids == expected[name].ids
        assert content(source) == content(expected[name])
    refusal(lambda: open_folder(linked, follow_links=False), "b is a link", "follow_links")
    (linked / "b").unlink()
    make_folder(linked, {"b": 9})
    refusal(lambda: open_folder(linked, follow_links=False), ".png is a link", "follow_links")


@pytest.mark.parametrize("target", ["..", ".", "../..", "../b", "loop"])
def test_link_loops_are_refused(target, tmp_path):
    make_folder(tmp_path, {"a": 9, "b": 9})
    (tmp_path / "a" / "loop").symlink_to(target)
    (tmp_path / "b" / "loop").symlink_to("../a")
    reason = "Too many levels" if target == "loop" else "links back to a folder around it"
    text = refusal(lambda: open_folder(tmp_path), "/loop", reason, "remove it")
    assert target == "../b" or f"{tmp_path}/a/loop" in text or f"{tmp_path}/b/loop/loop" in text


def test_hostile_names_survive(tmp_path):
    names = ["new\nline", "back\\slash", "naïve 图", "\x1b[31m", "undecodable \udcff", "-rf $(x)"]
    for name in names:
        make_folder(tmp_path, {name: 5})
        (tmp_path / name / "0.png").rename(tmp_path / name / f"{name}.png")
    sources = open_folder(tmp_path)
    every = [path for source in sources.values() for path in source.ids]
    assert len(set(every)) == 5 * len(names)
    assert all(text.isprintable() and text.encode() for text in every)
    for source in sources.values():
        assert len(set(source.class_names)) == len(names)
        assert all(name.isprintable() and name.encode() for name in source.class_names)
        assert len(content(source)) == len(source)
    make_folder(tmp_path, {"empty\n\udcff": 0})
    refusal(lambda: open_folder(tmp_path), "empty\\n\\udcff")


def test_the_fingerprint_changes_with_a_file_and_with_nothing_else(tmp_path):
    def prints(**options):
        return {
            name: source.fingerprint for name, source in open_folder(tmp_path, **options).items()
        }

    make_folder(tmp_path, {"train/a": 9, "train/b": 9, "test/a": 3, "test/b": 3})
    before = prints()
    assert prints() == before and len(set(before.values())) == 3
    assert not set(prints(channels=1).values()) & set(before.values())
    path = tmp_path / "test/a/0.png"
    stat, content = path.stat(), path.read_bytes()
    os.utime(path, ns=(1, 1))
    assert prints() == before
    path.write_bytes(content[:-1] + b"x")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = prints()
    assert after["test"] != before["test"] and after["train"] == before["train"]
    path.unlink()
    path.symlink_to("nothing")
    assert prints()["test"] not in (before["test"], after["test"])
    (tmp_path / "train/a").rename(tmp_path / "train/c")
    (tmp_path / "test/a").rename(tmp_path / "test/c")
    assert prints()["train"] != before["train"]


def test_a_folder_given_to_digits_is_warned_of(tmp_path, caplog):
    open_sources("digits", data_dir=str(tmp_path), channels=1)
    assert f"config.data.dir={tmp_path} is not used" in caplog.text
