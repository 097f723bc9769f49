import csv
import io
import json
import os
import shutil
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

from imgcls import experiment, load
from imgcls.errors import BadExampleError, CheckpointError, UserError
from imgcls.evaluation.evaluate import evaluate
from imgcls.inference import predict as module
from imgcls.inference.classifier import fitted_temperature
from imgcls.inference.predict import find_files, predict
from tests.commands import run_fresh
from tests.helpers import all_images, small_config, write_untrained_run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    write_untrained_run(workdir, small_config(), tuple("0123456789"))
    return workdir


@pytest.fixture(scope="module")
def classifier(workdir):
    return load(workdir)


@pytest.fixture(scope="module")
def digits(classifier, workdir):
    """The test images, after their evaluation."""
    (test,) = experiment.open_splits(classifier.config, "test")
    evaluate(classifier, {"test": test}, workdir, split="test", checkpoint="latest")
    return all_images(test)


@pytest.fixture(scope="module")
def pictures(digits, tmp_path_factory):
    """The test images as PNG files, named in their order."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(digits):
        Image.fromarray(image[..., 0]).save(folder / f"{i:03}.png")
    return folder


def evaluated(workdir):
    with np.load(workdir / "predictions.npz") as saved:
        return np.asarray(jax.nn.softmax(saved["logits"]))


def run(workdir, *arguments):
    return run_fresh("imgcls", "predict", f"--workdir={workdir}", *arguments)


def test_files_of_the_test_images_get_the_bits_of_the_evaluation(workdir, classifier, pictures):
    found = np.stack(list(predict(classifier, find_files([str(pictures)]))))
    np.testing.assert_array_equal(found, evaluated(workdir))


def test_in_other_batches_they_get_the_same_within_a_millionth(workdir, pictures):
    classifier = load(workdir)
    classifier.config.eval.batch_size = 8
    found = np.stack(list(predict(classifier, find_files([str(pictures)]))))
    np.testing.assert_allclose(found, evaluated(workdir), rtol=0, atol=1e-6)


def test_every_kind_of_picture_of_a_digit_is_that_digit(classifier, digits, tmp_path):
    gray = digits[0, ..., 0]
    plain = Image.fromarray(gray)
    sideways = plain.getexif()
    sideways[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    kinds = {
        "8.bmp": (plain, {}),
        "16.png": (Image.fromarray(gray.astype(np.uint16) * 257), {}),
        "colour.webp": (plain.convert("RGB"), {"lossless": True}),
        "palette.png": (plain.convert("P"), {}),
        "first.gif": (plain, {"save_all": True, "append_images": [Image.new("L", (8, 8))]}),
        "opaque.png": (plain.convert("RGBA"), {}),
        "no extension": (plain, {"format": "PNG"}),
        "sideways.png": (plain.transpose(Image.Transpose.ROTATE_90), {"exif": sideways}),
    }
    for name, (image, options) in kinds.items():
        image.save(tmp_path / name, **options)
    for path, found in zip(kinds, predict(classifier, [str(tmp_path / k) for k in kinds])):
        np.testing.assert_allclose(found, classifier(digits[:1])[0], atol=1e-6, err_msg=path)


def test_pictures_of_any_size_and_colour_get_probabilities(classifier, tmp_path):
    pictures = [
        Image.new("L", (1, 1)),
        Image.new("RGB", (4000, 1), "red"),
        Image.new("RGB", (1, 4000)),
        Image.new("CMYK", (30, 20), (0, 9, 99, 0)),
        Image.new("RGBA", (30, 20), (9, 9, 9, 0)),
        Image.new("1", (100, 300)),
    ]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / str(i), "JPEG" if picture.mode == "CMYK" else "PNG")
    found = np.stack(list(predict(classifier, find_files([str(tmp_path)]))))
    assert found.shape == (len(pictures), 10) and found.dtype == np.float32
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    arrays = [np.asarray(p.convert("L"))[..., None] for p in pictures[:3]]
    np.testing.assert_allclose(classifier(arrays), found[:3], atol=1e-6)


def test_an_unreadable_file_leaves_the_others_as_they_are(classifier, pictures, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    good = [str(pictures / f"{i:03}.png") for i in range(3)]
    expected = list(predict(classifier, good))
    first, bad, *rest = predict(classifier, [good[0], str(tmp_path / "bad.png"), *good[1:]])
    assert isinstance(bad, BadExampleError) and "bad.png" in str(bad)
    np.testing.assert_allclose([first, *rest], expected, atol=1e-6)
    (only,) = predict(classifier, [str(tmp_path / "bad.png")])
    assert isinstance(only, BadExampleError)


def test_one_batch_is_in_memory_at_a_time(classifier, pictures, monkeypatch):
    reads = []
    decode = module.decode_image
    monkeypatch.setattr(module, "decode_image", lambda *a, **k: reads.append(1) or decode(*a, **k))
    found = predict(classifier, find_files([str(pictures)]) * 3)
    next(found)
    assert len(reads) == classifier.config.eval.batch_size < 3 * 50
    assert len(list(found)) == 3 * 50 - 1 == len(reads) - 1


def test_folders_are_searched_once_each_and_hidden_files_left_out(tmp_path):
    for name in ["b/2.png", "b/1", "a/z/1.png", ".git/no.png", "b/.no.png", "c/Thumbs.db", "0.png"]:
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).touch()
    top, linked = tmp_path / "top", tmp_path / "elsewhere"
    linked.mkdir()
    (linked / "far.png").touch()
    (top / "a/loop").symlink_to(top)
    (top / "d").symlink_to(linked)
    (top / "gone.png").symlink_to("nowhere")
    os.mkfifo(top / "pipe.png")
    names = ["0.png", "a/z/1.png", "b/1", "b/2.png", "d/far.png", "gone.png"]
    expected = [str(top / name) for name in names]
    assert find_files([str(top)]) == expected
    first = str(top / "b/2.png")
    assert find_files([first, str(top), first]) == [first, *expected, first]


def test_what_a_folder_holds_besides_pictures_is_told(tmp_path, caplog):
    for name in ["1.png", "1_mask.png", "notes.txt", "more.txt", "@eaDir/1.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with caplog.at_level("INFO"):
        assert find_files([str(tmp_path)]) == [str(tmp_path / "1.png")]
    told = f"{tmp_path}: left out: 2 .txt, 1 @eaDir/, 1 masks beside their pictures"
    assert caplog.messages == [told]


def test_what_is_no_regular_file_is_refused_without_reading_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (str(tmp_path / "pipe.png"), os.devnull):
        with pytest.raises(UserError, match=f"{path} is no regular file"):
            find_files([path])


def test_what_cannot_be_searched_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no\\nwhere does not exist"):
        find_files([str(tmp_path), str(tmp_path / "no\nwhere")])
    for nothing in ([], [str(tmp_path)]):
        with pytest.raises(UserError, match="no file to predict"):
            find_files(nothing)


def test_lines_for_programs(workdir, classifier, digits, tmp_path):
    names = ["0\x1b[31m\n\udcff.png", "1.png", "2.png"]
    for name, image in zip(names, digits):
        Image.fromarray(image[..., 0]).save(tmp_path / name)
    (tmp_path / "1.png").write_bytes(b"")
    result = run(workdir, "--json", "--top=10", tmp_path)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["path"] for row in rows] == [str(tmp_path / name) for name in names]
    assert set(rows[1]) == {"path", "error"} and "is empty" in rows[1]["error"]
    assert result.returncode == 2
    assert "1.png: the file is empty" in result.stderr and "1 of 3 files" in result.stderr
    for row, image in zip(rows[::2], digits[::2]):
        found = {p["class"]: p["probability"] for p in row["predictions"]}
        assert list(found.values()) == sorted(found.values(), reverse=True)
        expected = dict(zip(classifier.class_names, classifier(image[None])[0]))
        assert found == pytest.approx(expected, abs=1e-6)


class Flags(SimpleNamespace):
    def __contains__(self, name):
        return hasattr(self, name)


def set_flags(monkeypatch, workdir, **changed):
    values = {"workdir": workdir, "checkpoint": "", "top": None, "threshold": None}
    values |= {"json": False, "csv": False, "raw": False} | changed
    monkeypatch.setattr(flags, "FLAGS", Flags(**values))


def test_a_table_for_people(workdir, classifier, digits, tmp_path, monkeypatch, capsys):
    set_flags(monkeypatch, workdir)
    path = tmp_path / "0\x1b[31m\n\\.png"
    Image.fromarray(digits[0, ..., 0]).save(path)
    module.main([str(path)])
    found = classifier(digits[:1])[0]
    best = "  ".join(f"{k} {found[k]:6.1%}" for k in np.argsort(-found)[:5])
    assert capsys.readouterr().out == rf"{tmp_path}/0\x1b[31m\n\.png  {best}" + "\n"


def test_probabilities_are_calibrated_where_a_temperature_was_fitted(
    workdir, classifier, digits, tmp_path, monkeypatch, capsys, caplog
):
    shutil.copytree(workdir, tmp_path / "run")
    path = tmp_path / "run/results_validation_latest.json"
    path.write_text(json.dumps({"step": 0, "calibration": {"temperature": 0.5}}))
    caplog.set_level("INFO")
    calibrated = load(tmp_path / "run")
    assert f"temperature 0.500 of {path}" in caplog.text
    found, plain = calibrated(digits), classifier(digits)
    np.testing.assert_allclose(found, plain**2 / (plain**2).sum(1, keepdims=True), atol=1e-6)
    np.testing.assert_array_equal(load(tmp_path / "run", calibrated=False)(digits), plain)
    Image.fromarray(digits[0, ..., 0]).save(tmp_path / "0.png")
    for raw, expected in ((False, found), (True, plain)):
        set_flags(monkeypatch, tmp_path / "run", json=True, raw=raw)
        module.main([str(tmp_path / "0.png")])
        best = json.loads(capsys.readouterr().out)["predictions"][0]["probability"]
        assert best == pytest.approx(expected[0].max(), abs=1e-6)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_predictions_that_cannot_be_written_are_an_error(workdir, pictures, monkeypatch):
    set_flags(monkeypatch, workdir)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(UserError, match="output cannot be written .No space"):
            module.main([str(pictures)])


@pytest.mark.parametrize(
    "results",
    [
        {"step": 7, "calibration": {"temperature": 0.5}},
        {"step": 0, "calibration": {"temperature": None}},
        {"step": 0, "calibration": {"temperature": -1}},
        {"step": 0, "calibration": {"temperature": 10**400}},
        {"step": 0, "calibration": "0.5"},
        {"step": 0, "figures": ["loss"]},
        [],
        "torn",
    ],
    ids=str,
)
def test_a_temperature_of_another_step_and_none_at_all_calibrate_nothing(results, tmp_path):
    text = json.dumps(results)
    (tmp_path / "results.json").write_text(text[:-1] if results == "torn" else text)
    assert fitted_temperature(tmp_path, 0) == 1


@pytest.mark.parametrize("top", [0, -1, 11])
def test_no_class_and_more_than_there_are_cannot_be_asked_for(workdir, pictures, monkeypatch, top):
    set_flags(monkeypatch, workdir, top=top)
    with pytest.raises(UserError, match=f"--top={top} must be from 1 to 10"):
        module.main([str(pictures)])


def test_one_or_several_paths_pictures_and_arrays_of_any_kind_are_that_digit(
    classifier, digits, pictures, tmp_path, monkeypatch
):
    gray, path = digits[0, ..., 0], pictures / "000.png"
    monkeypatch.setenv("HOME", str(pictures))
    plain = Image.fromarray(gray)
    colour = np.dstack([gray] * 3)
    sideways = plain.transpose(Image.Transpose.ROTATE_90)
    exif = sideways.getexif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    sideways.save(tmp_path / "sideways.png", exif=exif)
    expected = classifier(digits[:1])
    assert expected.shape == (1, 10)
    kinds = (
        path,
        str(path),
        "~/000.png",
        plain,
        plain.convert("RGBA"),
        Image.open(tmp_path / "sideways.png"),
    )
    kinds += (gray, gray[..., None], colour, np.dstack([colour, np.full_like(gray, 255)]))
    kinds += (gray / 255, np.float32(colour) / 255)
    for kind in kinds:
        np.testing.assert_allclose(classifier(kind), expected, atol=1e-6, err_msg=str(type(kind)))
    found = classifier([*kinds, *digits[1:3]])
    np.testing.assert_allclose(found[:-2], np.tile(expected, (len(kinds), 1)), atol=1e-6)
    np.testing.assert_allclose(found[-2:], classifier(digits[1:3]), atol=1e-6)
    transparent = np.dstack([colour, np.zeros_like(gray)])
    white = classifier(np.full_like(gray, 255))
    np.testing.assert_allclose(classifier(transparent), white, atol=1e-6)


@pytest.mark.parametrize(
    "image",
    [np.zeros((8, 8), np.int32), np.full((8, 8), 2.0), np.zeros((8, 8, 5), np.uint8), np.zeros(8)],
    ids=["int32", "floats over 1", "five channels", "one axis"],
)
def test_another_array_is_refused_with_what_is_expected(classifier, image):
    with pytest.raises(ValueError, match=r"of uint8 or of floats in \[0, 1\], not"):
        classifier([image])
    with pytest.raises(BadExampleError, match="nowhere.png"):
        classifier("nowhere.png")


def test_a_step_may_be_a_number(workdir):
    assert load(workdir, 0, calibrated=False).state.step == 0
    with pytest.raises(CheckpointError, match="no checkpoint 7: there are latest, 0"):
        load(workdir, 7)


def test_loading_a_run_tells_nothing_of_orbax(workdir, caplog):
    caplog.set_level("INFO")
    load(workdir)
    assert not [record for record in caplog.records if "orbax" in record.pathname]


def test_a_table_for_spreadsheets_quotes_names_and_tells_errors(
    workdir, digits, tmp_path, monkeypatch, capsys
):
    names = ['a "quoted", name.png', "bad.png", "two\nlines and\u202fspaces\u3000.png"]
    for name in names[::2]:
        Image.fromarray(digits[0, ..., 0]).save(tmp_path / name)
    (tmp_path / "bad.png").write_bytes(b"")
    set_flags(monkeypatch, workdir, csv=True, top=2)
    with pytest.raises(UserError, match="1 of 3 files cannot be read"):
        module.main([str(tmp_path)])
    header, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert header == ["path", "class", "probability", "unsure", "error"]
    paths = [str(tmp_path / name) for name in names]
    assert [row[0] for row in rows] == [paths[0], paths[0], paths[1], paths[2], paths[2]]
    found = load(workdir)(digits[:1])[0]
    best = np.argsort(-found)[:2]
    assert [row[1] for row in rows[:2]] == [str(k) for k in best]
    assert [float(row[2]) for row in rows[:2]] == pytest.approx(found[best], abs=1e-6)
    assert "is empty" in rows[2][4] and not any(row[4] for row in (*rows[:2], *rows[3:]))


def test_a_picture_whose_best_class_is_below_the_threshold_is_marked(
    workdir, classifier, digits, pictures, monkeypatch, capsys
):
    best = classifier(digits).max(1)
    for kind in ({}, {"json": True}, {"csv": True}):
        set_flags(monkeypatch, workdir, threshold=float(np.median(best)), **kind)
        module.main([str(pictures)])
        lines = capsys.readouterr().out.splitlines()[1 if "csv" in kind else 0 :]
        mark = {"json": '"unsure": true', "csv": ",True,"}.get("".join(kind), "unsure")
        assert [mark in line for line in lines] == (best < np.median(best)).tolist()
    with pytest.raises(UserError, match="--json and --csv exclude each other"):
        set_flags(monkeypatch, workdir, json=True, csv=True)
        module.main([str(pictures)])
