"""Nothing that was read is executed, and nothing is written outside, whatever names say."""

import _pickle
import io
import json
import multiprocessing.reduction
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from imgcls import experiment, load
from imgcls.data import cache
from imgcls.inference.export import FORMATS, FloatModel, export
from imgcls.inference.predict import predict
from imgcls.run import logs
from imgcls.train import train_and_evaluate
from tests.helpers import ROOT, all_images, small_config, write_untrained_run
from tests.inference.test_export import needs_onnx

PARTS = ("train", "validation", "test")


@pytest.fixture
def no_pickle(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something is unpickled")

    for module in (pickle, _pickle):
        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(pickle, "_Unpickler", refuse)
    monkeypatch.setattr(multiprocessing.reduction.ForkingPickler, "loads", refuse)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """An untrained run, whose test split is in the cache."""
    workdir = tmp_path_factory.mktemp("run")
    write_untrained_run(workdir, small_config(), tuple("0123456789"))
    experiment.open_splits(small_config(), "test")
    return workdir


def test_a_checkpoint_and_a_cache_are_read_without_pickle(workdir, no_pickle, monkeypatch):
    monkeypatch.setattr(cache, "fit_image", lambda *_, **__: pytest.fail("it was not in the cache"))
    classifier = load(workdir)
    (test,) = experiment.open_splits(classifier.config, "test")
    assert classifier.logits(test).shape == (50, 10)


@pytest.mark.parametrize(
    "file_format", [pytest.param(f, marks=needs_onnx if f == "onnx" else ()) for f in FORMATS]
)
def test_an_export_is_read_without_pickle(workdir, file_format, tmp_path, request):
    classifier = load(workdir)
    (test,) = experiment.open_splits(classifier.config, "test")
    export(classifier, test, tmp_path / "model", file_format=file_format)
    request.getfixturevalue("no_pickle")
    found = FORMATS[file_format][1](tmp_path / "model", FloatModel(classifier))(all_images(test))
    assert np.shape(found) == (50, 10)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_in_the_cache_is_decoded_again_and_not_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = all_images(*experiment.open_splits(small_config(), "test"))
    (path,) = (tmp_path / "cache/imgcls/datasets").iterdir()
    content, pickled = path.read_bytes(), io.BytesIO()
    np.save(pickled, np.array([Trap(tmp_path / "sprung")], object), allow_pickle=True)
    for kept in (0, 50 * 64):  # nothing, then the images
        path.write_bytes(content[:kept] + 3 * pickled.getvalue())
        found = all_images(*experiment.open_splits(small_config(), "test"))
        np.testing.assert_array_equal(found, expected)
        assert "is damaged" in caplog.text and not (tmp_path / "sprung").exists()
        assert path.read_bytes() == content
        caplog.clear()


# Class and file names as an attacker, or a careless colleague, may choose them.
NAMES = ["..evil", "<img src=x onerror=alert(1)>", "~", "$(touch sprung)", "up\\..\\..\nline"]


def odd_pictures():
    gray = Image.linear_gradient("L").resize((12, 12))
    sideways = gray.getexif()
    sideways[0x0112] = 6
    return {
        "16 bit.png": (Image.fromarray(np.asarray(gray).astype(np.uint16) * 257), {}),
        "cmyk.jpg": (Image.new("CMYK", (9, 7), (0, 9, 99, 0)), {}),
        "palette.png": (gray.convert("RGB").quantize(16), {}),
        "alpha.png": (Image.new("RGBA", (9, 7), (9, 9, 9, 100)), {}),
        "animated.gif": (gray, {"save_all": True, "append_images": [Image.new("L", (12, 12))]}),
        "turned.jpg": (gray, {"exif": sideways}),
        "1x1.png": (Image.new("L", (1, 1), 200), {}),
        "1x4000.png": (Image.linear_gradient("L").resize((1, 4000)), {}),
        "<b>..%2f..%2f&amp;.png": (gray.rotate(90), {}),
    }


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory):
    """A whole run on a folder of odd pictures under odd names, in a directory of its own."""
    top = tmp_path_factory.mktemp("top")
    for part in PARTS:
        for name in NAMES:
            folder = top / "pictures" / part / name
            folder.mkdir(parents=True)
            for file, (image, options) in odd_pictures().items():
                image.save(folder / file, **options)
    before = {path for path in top.rglob("*")}
    config = small_config(
        data__name="image_folder", data__dir=str(top / "pictures"), data__test="test",
        data__train="train", data__validation="validation", train__batch_size=8, train__epochs=1,
        eval__batch_size=64,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(top)
        patch.setenv("XDG_CACHE_HOME", str(top / "cache"))
        train_and_evaluate(config, top / "run")
    return top, before


def test_nothing_is_written_outside_whatever_the_names_are(odd_run):
    top, before = odd_run
    assert len(list((top / "cache/imgcls/datasets").iterdir())) == len(PARTS)
    allowed = (top / "run", top / "cache")
    outside = {p for p in top.rglob("*") if not any(p.is_relative_to(a) for a in allowed)}
    assert outside == before
    assert not [p for a in allowed for p in a.rglob("*") if "evil" in p.name or "touch" in p.name]
    page = (top / "run/report.html").read_text()
    assert "<img src=x" not in page and "&lt;img src=x" in page and "<b>..%2f" not in page


HOSTILE = "\x1b]0;title\x07\x9b31m\r\u202e\udcff"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_what_is_said_is_shown_and_never_obeyed(encoding, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding, "backslashreplace"))
    sys.stdout.reconfigure(errors="strict")
    sys.stderr.isatty = lambda: True
    logs.say(f"naïve 图 {HOSTILE}\nline")
    logs.complain(HOSTILE)
    with logs.progress(1, f"decoding {HOSTILE}", "images"):
        pass
    said, complained = (stream.buffer.getvalue() for stream in (sys.stdout, sys.stderr))
    escaped = r"\x1b]0;title\x07\x9b31m\r\u202e\udcff"
    shown = "naïve 图".encode(encoding, "backslashreplace").decode(encoding)
    assert said.decode(encoding) == f"{shown} {escaped}\nline\n"
    assert complained.decode(encoding).count(escaped) >= 2 and b"\x1b]" not in complained


READER = """
import sys
from pathlib import Path
from imgcls import experiment
from imgcls.run import cli
class Command:
    define_flags = staticmethod(lambda: None)
    main = staticmethod(lambda _: experiment.open_splits(experiment.load_config(Path(sys.argv[2]))))
cli.run(lambda: Command, sys.argv[:1])
"""


def test_names_in_a_workdir_reach_the_terminal_escaped(workdir, tmp_path):
    """A key of config.json in a warning, a folder in an error."""
    config = json.loads((workdir / "config.json").read_text()) | {HOSTILE: 1}
    config["data"] |= {"name": "image_folder", "dir": HOSTILE}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", READER, "command", tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=100)
    assert result.returncode == 2
    assert all(char.isprintable() or char == "\n" for char in result.stderr.decode())
    assert result.stderr.count(rb"\x1b]0;title\x07\x9b31m\r\u202e\udcff") == 2, result.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
@pytest.mark.parametrize(
    ("redirection", "why"), [(">/dev/full", b"No space"), (">&-", b"Bad file"), ("2>&-", b"")]
)
def test_output_that_cannot_be_written_is_one_line_and_not_the_end(redirection, why):
    command = f"{sys.executable} main.py --config=configs/digits.py --help {redirection}"
    result = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, timeout=100)
    assert result.returncode == 0
    assert result.stderr.count(b"\n") == bool(why) and why in result.stderr
    assert b"Traceback" not in result.stderr and bool(result.stdout) == (not why)


def test_odd_pictures_are_predicted_as_they_were_evaluated(odd_run):
    top, _ = odd_run
    with np.load(top / "run/predictions.npz", allow_pickle=False) as saved:
        expected, ids = np.asarray(jax.nn.softmax(saved["logits"])), saved["ids"].tolist()
    classes = [name for name in NAMES if not name.startswith(".")]  # hidden folders are no classes
    files = {
        f"test:test/{name}/{file}": top / "pictures/test" / name / file
        for name in classes
        for file in odd_pictures()
    }
    assert len(ids) == len(files)
    paths = [files[i.replace("\\n", "\n").replace("\\\\", "\\")] for i in ids]
    plain = load(top / "run", calibrated=False)
    found = np.stack(list(predict(plain, [os.fspath(path) for path in paths])))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert len(np.unique(expected, axis=0)) == 7, "three of the nine show the same"


def test_every_test_that_a_promise_names_exists():
    named = re.findall(r"`(test_\w+)::(test_\w+)`", (ROOT / "docs/robustness.md").read_text())
    assert len(named) > 20
    for file, function in named:
        (path,) = (ROOT / "tests").rglob(f"{file}.py")
        source = path.read_text()
        assert re.search(rf"^def {function}\(", source, re.MULTILINE), f"{file}::{function}"
