"""Datasets of huggingface.co, here as folders of their files."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image

from imgcls.data.images import decode_image
from imgcls.data.sources import open_sources
from imgcls.data.splits import load_splits
from imgcls.errors import BadExampleError, UserError

PICTURES = {"train": 6, "validation": 2, "test": 4}


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (5, 6, 3), np.uint8)).save(
        file, "PNG"
    )
    return file.getvalue()


def write(folder, content=png, **columns):
    folder.mkdir()
    kinds = columns or {"img": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b\x1b"])}
    for number, (split, count) in enumerate(PICTURES.items()):
        rows = {
            "img": [{"bytes": content(10 * number + i), "path": None} for i in range(count)],
            "kind": [i % 2 for i in range(count)],
        }
        found = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
        found.to_parquet(folder / f"{split}.parquet")
    return f"hf:{folder}"


@pytest.fixture(autouse=True)
def quietly():
    datasets.disable_progress_bars()


def test_splits_pictures_labels_and_classes_are_those_of_the_files(tmp_path):
    name = write(tmp_path / "pictures")
    sources = open_sources(name, data_dir=str(tmp_path / "cache"), channels=3)
    assert {split: len(source) for split, source in sources.items()} == PICTURES
    assert sources["train"].class_names == ("a", r"b\x1b")
    example = sources["test"][3]
    assert example["label"] == 1
    np.testing.assert_array_equal(example["image"], decode_image(png(23), channels=3))
    how = {"image_size": (5, 6), "channels": 3, "resize": "squash"}
    (split,) = load_splits(sources, ["train[2:]"], **how)
    assert split.labels.tolist() == [0, 1, 0, 1] and split.ids[0] == "train:2"


def test_the_fingerprint_is_of_the_content(tmp_path):
    def opened(folder, content=png):
        name = write(tmp_path / folder, content)
        return open_sources(name, data_dir=str(tmp_path / "cache"), channels=3)["test"].fingerprint

    assert opened("a") == opened("copy")
    assert opened("b", lambda number: png(number + (number == 21))) != opened("c")


def test_a_damaged_picture_is_named(tmp_path):
    name = write(tmp_path / "pictures", lambda number: png(number)[:-30] if number == 2 else png(2))
    source = open_sources(name, data_dir=str(tmp_path / "cache"), channels=1)["train"]
    assert source[1]["image"].shape == (5, 6, 1)
    with pytest.raises(BadExampleError, match=r"pictures train\[2\]: "):
        source[2]


def test_what_is_no_such_dataset_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere cannot be opened .*name a folder with it"):
        open_sources(f"hf:{tmp_path}/nowhere", data_dir=str(tmp_path / "cache"), channels=3)
    number = write(tmp_path / "other", img=datasets.Image(), kind=datasets.Value("int64"))
    with pytest.raises(UserError, match=r"one ClassLabel, but it has img \(Image\), kind \(Value"):
        open_sources(number, data_dir=str(tmp_path / "cache"), channels=3)


def test_a_picture_whose_file_is_gone_is_named(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / "pictures/train" / name).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "pictures/train" / name / f"{number}.png").write_bytes(png(number))
    monkeypatch.setenv("HOME", str(tmp_path))
    name = "hf:~/pictures"
    source = open_sources(name, data_dir=str(tmp_path / "cache"), channels=1)["train"]
    (tmp_path / "pictures/train/b/1.png").unlink()
    assert source.fingerprint and source[0]["label"] == 0
    with pytest.raises(BadExampleError, match=r"pictures train\[3\]: "):
        source[3]
