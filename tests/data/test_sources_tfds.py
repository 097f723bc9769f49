"""TensorFlow runs in child processes only, as it does for a user; nothing here needs a network."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from imgcls.data import tfds
from imgcls.data.sources import open_sources
from imgcls.data.tfds import find
from imgcls.errors import BadExampleError, UserError
from tests.data.make_tfds_datasets import TEST, TRAIN, picture

ROOT = Path(__file__).parents[2]
# Opens a dataset and reads all of it, as a program that has nothing else in it.
READER = """
import hashlib, signal, sys
from imgcls.errors import UserError
from imgcls.data.sources import open_sources
# A shell's background job, tests included, would have it ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    sources = open_sources(sys.argv[1], data_dir=sys.argv[2], channels=3)
except UserError as error:
    sys.exit(f"refused: {error}")
for name, source in sorted(sources.items()):
    examples = source.read(range(len(source)))
    data = b"".join(e["image"].tobytes() + bytes([e["label"]]) for e in examples)
    print(name, len(source), hashlib.sha256(data).hexdigest())
assert "tensorflow" not in sys.modules
"""


def start_reader(name: str, data_dir: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", READER, name, data_dir],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


@contextlib.contextmanager
def held_lock(data_dir: Path, name: str):
    """Holds what a process that prepares this dataset would hold."""
    with (data_dir / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def refusal(call, *words) -> None:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in text
    assert not [word for word in words if str(word) not in text], text


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A data directory with the datasets of make_tfds_datasets.py, shared by all xdist workers."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (base / "tfds.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / "tfds").exists():
            script = ROOT / "tests/data/make_tfds_datasets.py"
            subprocess.run(
                [sys.executable, script, base / "tfds"], check=True, stderr=subprocess.DEVNULL
            )
    return base / "tfds"


@pytest.fixture
def copy(prepared, tmp_path):
    """Copies a prepared dataset to a data directory of its own, to be damaged there."""

    def make(name: str) -> Path:
        shutil.copytree(prepared / name, tmp_path / name)
        return tmp_path

    return make


def check_tiny(sources) -> None:
    assert {name: len(source) for name, source in sources.items()} == {"train": 120, "test": 20}
    for name, numbers in (("train", TRAIN), ("test", TEST)):
        examples = [sources[name][i] for i in range(len(sources[name]))]
        found = [int(example["image"][0, 0, 0]) for example in examples]
        assert sorted(found) == list(numbers)
        for number, example in zip(found, examples):
            np.testing.assert_array_equal(example["image"], picture(number))
            assert example["label"] == number % 100


def test_every_example_is_read_as_it_was_made(prepared):
    sources = open_sources("tiny", data_dir=str(prepared), channels=3)
    check_tiny(sources)
    source = sources["train"]
    assert source.class_names == tuple(f"class {i}" for i in range(100))
    assert list(source.ids) == list(range(120))
    assert "tensorflow" not in sys.modules


def test_reading_many_equals_reading_one_by_one_in_any_order(prepared):
    source = open_sources("tiny", data_dir=str(prepared), channels=1)["train"]
    order = np.random.default_rng(0).permutation(120)
    for index, example in zip(order, source.read(order)):
        np.testing.assert_array_equal(example["image"], source[index]["image"])
        assert example["image"].shape == (32, 32, 1)
        assert example["label"] == source[index]["label"]
    np.testing.assert_array_equal(source[-1]["image"], source[119]["image"])
    with pytest.raises(IndexError):
        source[120]


def test_the_data_directory_is_the_given_one_else_tfds_data_dir(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert len(open_sources("tiny:1.0.0", data_dir=None, channels=3)["test"]) == 20
    refusal(lambda: open_sources("tiny", data_dir=str(tmp_path), channels=3), "unknown", "tiny")
    refusal(lambda: open_sources("tiny", data_dir="gs://bucket", channels=3), "gs://bucket")
    for name in ("a\0b", "x" * 300, "x/" * 3000, "\udcff", "a\nb", "~nobody/x\0"):
        refusal(lambda: open_sources("tiny", data_dir=name, channels=3), "--config.data.dir")


def test_the_newest_version_and_the_named_config_are_found(tmp_path):
    for path in ("x/1.9.0", "x/1.10.0", "x/incomplete.A_2.0.0", "y/one/1.0.0", "y/two/2.0.0"):
        (tmp_path / path).mkdir(parents=True)
    assert find("x", tmp_path) == tmp_path / "x/1.10.0"
    assert find("x:1.9.0", tmp_path) == tmp_path / "x/1.9.0"
    assert find("x:3.0.0", tmp_path) is None
    assert find("y", tmp_path) is None
    assert find("y/two", tmp_path) == tmp_path / "y/two/2.0.0"
    (tmp_path / "y/.config").mkdir()
    (tmp_path / "y/.config/metadata.json").write_text('{"default_config_name": "one"}')
    assert find("y", tmp_path) == tmp_path / "y/one/1.0.0"


@pytest.mark.parametrize("content", ["", "[]", '{"default_config_name": 5}', "[" * 9000])
def test_a_damaged_choice_of_the_config_is_named(content, tmp_path):
    (tmp_path / "x/.config").mkdir(parents=True)
    (tmp_path / "x/.config/metadata.json").write_text(content)
    refusal(lambda: find("x", tmp_path), tmp_path / "x/.config", "damaged")


def test_the_fingerprint_tells_splits_channels_and_files_apart(prepared, copy):
    def prints(root, channels=3):
        sources = open_sources("tiny", data_dir=str(root), channels=channels)
        return [source.fingerprint for source in sources.values()]

    root = copy("tiny")
    before = prints(root)
    assert prints(root) == before == prints(prepared)
    assert len({*before, *prints(root, 1)}) == 4
    (shard,) = (root / "tiny/1.0.0").glob("tiny-train*-00001-of-00002")
    os.utime(shard, ns=(1, 1))
    assert prints(root) == before
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert len({*before, *prints(root)}) == 3


def test_unknown_names_are_refused_with_near_ones(tmp_path):
    def opening(name):
        return partial(open_sources, name, data_dir=str(tmp_path), channels=3)

    refusal(opening("cifer10"), "cifer10", "digits", "image_folder", "TFDS", "mean", "cifar10")
    refusal(opening("image_fodler"), "image_folder")
    for name in ("../mnist", "mnist:3", "a b", ""):
        refusal(opening(name), "NAME[/CONFIG][:VERSION]")
    assert not any(tmp_path.iterdir())


def test_a_dataset_without_image_and_label_is_refused_with_its_features(prepared, tmp_path):
    for name, root in (("tiny_text", prepared), ("imdb_reviews", tmp_path)):
        call = partial(open_sources, name, data_dir=str(root), channels=3)
        refusal(call, f"{name} is no image classification dataset", "it has label, text")


def test_a_dataset_that_cannot_be_downloaded_says_how_to_get_it(tmp_path, monkeypatch):
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    words = ("mnist", "MiB from storage.googleapis.com", "tfds build mnist", "TFDS_DATA_DIR")
    refusal(lambda: open_sources("mnist", data_dir=str(tmp_path), channels=1), tmp_path, *words)


def test_a_data_directory_that_cannot_be_written_to_is_refused():
    root = "/proc/imgcls"
    refusal(lambda: open_sources("mnist", data_dir=root, channels=1), root, "can't be written to")


def empty(directory):
    shutil.rmtree(directory)
    directory.mkdir()


def truncated(directory):
    shard = sorted(directory.glob("*test*"))[0]
    os.truncate(shard, shard.stat().st_size // 2)


def corrupted(directory):
    shard = sorted(directory.glob("*test*"))[0]
    content = bytearray(shard.read_bytes())
    content[3000] ^= 1
    shard.write_bytes(content)


def without_splits(directory):
    info = json.loads((directory / "dataset_info.json").read_text())
    (directory / "dataset_info.json").write_text(json.dumps(info | {"splits": []}))


DAMAGES = {
    "empty": empty,
    "no features": lambda directory: (directory / "features.json").unlink(),
    "no info": lambda directory: (directory / "dataset_info.json").unlink(),
    "torn info": lambda directory: os.truncate(directory / "dataset_info.json", 100),
    "blank info": lambda directory: (directory / "dataset_info.json").write_text("{}"),
    "no splits": without_splits,
    "torn features": lambda directory: os.truncate(directory / "features.json", 100),
    "missing shard": lambda directory: sorted(directory.glob("*test*"))[0].unlink(),
    "empty shard": lambda directory: os.truncate(sorted(directory.glob("*test*"))[0], 0),
    "truncated shard": truncated,
    "corrupted shard": corrupted,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_is_named_with_the_remedy(damage, copy):
    root = copy("tiny")
    DAMAGES[damage](root / "tiny/1.0.0")

    def read():
        sources = open_sources("tiny", data_dir=str(root), channels=3)
        assert damage == "corrupted shard", "all other damage is found at once"
        list(sources["test"].read(range(20)))

    refusal(read, root / "tiny/1.0.0", "delete that directory", "--config.data.dir")


PLANTED = {"pythonClassName": "planted.Feature", "text": {}}
DICT = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
dictionary = lambda **features: {"pythonClassName": DICT, "featuresDict": {"features": features}}
NAMED = {
    "the whole": lambda saved: PLANTED,
    "one of them": lambda saved: saved["featuresDict"]["features"].update(id=PLANTED) or saved,
    "both of protobuf's names": lambda saved: (
        saved["featuresDict"]["features"]["image"].update(python_class_name="planted.Feature")
        or saved
    ),
    "of older versions": lambda saved: {
        "type": DICT, "content": {"image": {"type": "planted.Feature", "content": {}}}
    },
    "one within another": lambda saved: dictionary(x=dictionary(y=PLANTED)),
    "as text": lambda saved: {
        "pythonClassName": DICT,
        "jsonFeature": {"json": json.dumps({"x": {"type": "planted.Feature"}})},
    },
    "where TFDS's own are": lambda saved: {
        "pythonClassName": "tensorflow_datasets.core.features.planted.Image"
    },
}  # fmt: skip


@pytest.mark.parametrize("where", [*NAMED, "the other file"])
def test_a_class_that_a_prepared_dataset_names_is_never_imported(
    where, copy, tmp_path, monkeypatch
):
    root = copy("tiny")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "planted.py").write_text("raise SystemExit('the code of a dataset ran')")
    files = {name: root / f"tiny/1.0.0/{name}.json" for name in ("features", "dataset_info")}
    if where in NAMED:
        saved = NAMED[where](json.loads(files["features"].read_text()))
        files["features"].write_text(json.dumps(saved))
    else:
        info = json.loads(files["dataset_info"].read_text()) | {"features": PLANTED}
        files["dataset_info"].write_text(json.dumps(info))
    opening = partial(open_sources, "tiny", data_dir=str(root), channels=3)
    if where in ("both of protobuf's names", "the other file"):
        check_tiny(opening())
    else:
        refusal(opening, "tiny")
    assert "planted" not in sys.modules


def test_other_features_of_tfds_are_left_out(copy):
    root = copy("tiny")
    path = root / "tiny/1.0.0/features.json"
    saved = json.loads(path.read_text())
    boxes = "tensorflow_datasets.core.features.bounding_boxes.BBoxFeature"
    saved["featuresDict"]["features"]["box"] = {"pythonClassName": boxes, "boundingBox": {}}
    path.write_text(json.dumps(saved))
    check_tiny(open_sources("tiny", data_dir=str(root), channels=3))


def test_an_empty_directory_of_a_dataset_that_tfds_knows_is_named_too(tmp_path):
    (tmp_path / "mnist/3.0.1").mkdir(parents=True)
    (tmp_path / "mnist_corrupted/identity/1.0.0").mkdir(parents=True)
    for name in ("mnist", "mnist_corrupted", "mnist_corrupted/identity"):
        refusal(partial(open_sources, name, data_dir=str(tmp_path), channels=1), "complete")


def test_a_record_that_is_no_picture_is_a_bad_example(prepared):
    source = open_sources("tiny_broken", data_dir=str(prepared), channels=3)["test"]
    bad = 0
    for index in range(len(source)):
        try:
            source[index]
        except BadExampleError as error:
            assert f"tiny_broken/1.0.0 test[{index}]: not a JPEG" in str(error)
            bad += 1
    assert bad == 1
    with pytest.raises(BadExampleError):
        list(source.read(range(20)))


def test_a_picture_is_decoded_when_it_is_asked_for(prepared, monkeypatch):
    decoded = []
    decode = tfds.decode_image
    monkeypatch.setattr(tfds, "decode_image", lambda *a, **k: decoded.append(1) or decode(*a, **k))
    examples = open_sources("tiny", data_dir=str(prepared), channels=3)["train"].read(range(120))
    for count, _ in enumerate(examples, start=1):
        assert len(decoded) == count


@pytest.mark.slow
def test_two_processes_convert_tfrecord_once_whatever_a_killed_one_left(copy, prepared):
    root = copy("tiny_tfrecord")
    directory = root / "tiny_tfrecord/1.0.0"
    (directory / "tiny_tfrecord-train.array_record-00000-of-00002").write_text("torn")
    (directory / "incomplete.tiny_tfrecord-train.array_record-00001-of-00002").write_text("torn")
    with held_lock(root, "tiny_tfrecord"):
        readers = [start_reader("tiny_tfrecord", root) for _ in range(2)]
        for reader in readers:
            assert "waiting for another process" in reader.stderr.readline()
        assert "array_record" not in (directory / "dataset_info.json").read_text()
    said, read = zip(*[reader.communicate(timeout=100)[::-1] for reader in readers])
    assert [reader.returncode for reader in readers] == [0, 0], said
    assert "".join(said).count("converting") == 1
    assert read[0] == read[1] and read[0].count("\n") == 2
    check_tiny(open_sources("tiny_tfrecord", data_dir=str(root), channels=3))
    assert not list(directory.glob("incomplete*"))
    assert len(list(directory.glob("*.tfrecord*"))) == 4  # TFDS's own reader still has them


@pytest.mark.slow
def test_a_damaged_tfrecord_is_named_and_stays_unconverted(copy):
    root = copy("tiny_tfrecord")
    shard = sorted((root / "tiny_tfrecord/1.0.0").glob("*train*"))[1]
    length = int.from_bytes(shard.read_bytes()[:8], "little")
    os.truncate(shard, 8 + 4 + length + 4)  # one whole record, which TensorFlow takes for a file
    call = partial(open_sources, "tiny_tfrecord", data_dir=str(root), channels=3)
    refusal(call, "cannot convert", shard)
    assert "array_record" not in (root / "tiny_tfrecord/1.0.0/dataset_info.json").read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_child_ends_with_its_parent(number, copy):
    root = copy("tiny_tfrecord")
    others, own = (root / f"tiny_tfrecord/incomplete.{name}_1.0.0" for name in "AB")
    others.mkdir()
    with held_lock(root, "tiny_tfrecord"):
        reader = start_reader("tiny_tfrecord", root)
        assert "waiting for another process" in reader.stderr.readline()
        own.mkdir()  # as if it were preparing
        reader.send_signal(number)
        reader.communicate(timeout=30)  # until the child has closed its stderr, too
        assert reader.returncode and others.exists() and not own.exists()
