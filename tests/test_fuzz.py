"""Files of a workdir, each value edited to another type: one line that says so, no traceback."""

import copy
import itertools
import json
import logging

import numpy as np
import pytest
from absl import flags

from imgcls.config import to_json
from imgcls.errors import UserError
from imgcls.evaluation import compare, report
from imgcls.experiment import load_config
from imgcls.run.workdir import write_json
from tests.evaluation.test_report import SPLITS, gray_images
from tests.helpers import random_logits, small_config, write_run

OTHERS = (None, True, "text", "", -1, 0, 1.5, 10**400, float("nan"), [], [[]], {}, {"a": 1})
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numbers beyond any sense


def paths_of(value, path=()):
    """The place of every value in a JSON value."""
    if path:
        yield path
    parts = dict(enumerate(value)) if isinstance(value, list) else value
    for key, part in parts.items() if isinstance(parts, dict) else ():
        yield from paths_of(part, (*path, key))


def edits(value):
    """Copies of a JSON value: each part of it replaced by each of OTHERS, or removed."""
    for path in paths_of(value):
        for other in (*OTHERS, "removed"):
            edited = inside = copy.deepcopy(value)
            for key in path[:-1]:
                inside = inside[key]
            if other == "removed":
                del inside[path[-1]]
            else:
                inside[path[-1]] = other
            yield f"{path} = {other!r:.20}", edited


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    facts = {
        "dataset": "toy",
        "step": 4,
        "seconds": 60.0,
        "parameters": 9,
        "versions": {"jax": "1"},
    }
    facts |= {"images_per_second": 5.0, "checkpoint": "latest", "temperature": 1.5, "device": "cpu"}
    issue = {"split": "test", "row": 3, "id": "3", "given": "a", "suggested": "b"}
    facts |= {"label_issues": {"examples": 1, "first": [issue | {"p_suggested": 0.9}]}}
    facts |= {"test_time_augmentation": {"views": "flip", "top1": 0.5, "loss": 1.0}}
    folder = tmp_path_factory.mktemp("runs")
    config = to_json(small_config())
    return [write_run(folder / n, *random_logits(40, 2), config=config, **facts) for n in "ab"]


def is_told(action, *arguments):
    """Whether an action succeeds or tells in one line what is wrong."""
    try:
        action(*arguments)
    except UserError as error:
        assert "\n" not in str(error)
        return True
    return False


def compared(runs):
    if "output" not in flags.FLAGS:
        compare.define_flags()
    flags.FLAGS(["compare", f"--output={runs[0].parent / 'compare.html'}"])
    compare.main([str(run) for run in runs])


def reported(runs):
    report.write_report(runs[1], SPLITS)


@pytest.mark.parametrize(
    "show, every",
    [
        (compared, 97),
        (reported, 211),
        pytest.param(compared, 7, marks=pytest.mark.slow),
        pytest.param(reported, 23, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", ["results.json", "config.json"])
def test_values_of_other_types_are_shown_or_refused_in_a_line(runs, show, every, name):
    path = runs[1] / name
    content = path.read_text()
    show(runs)
    told = 0
    try:
        for edit, value in itertools.islice(edits(json.loads(content)), 0, None, every):
            logging.info(edit)
            path.write_text(json.dumps(value))
            told += is_told(show, runs)
    finally:
        path.write_text(content)
    assert told or name == "config.json"


NO_JSON = [b"", b"{", b"[1]", b"null", b"\0" * 50, b"\xff\xfe", b"[" * 5000, b"7" * 5000]
NO_JSON += [b'{"a":' * 900 + b"1" + b"}" * 900, b'{"model": [[[[[]]]]]}', b"NaN"]


@pytest.mark.parametrize("name", ["results.json", "config.json"])
@pytest.mark.parametrize("content", NO_JSON, ids=lambda content: f"{content[:9]}")
def test_what_is_no_json_object_is_refused_in_a_line(runs, name, content):
    path = runs[1] / name
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        assert is_told(report.read_run, runs[1]) or content == NO_JSON[-2]
        assert name == "results.json" or is_told(load_config, runs[1])
    finally:
        path.write_bytes(before)


def test_every_value_of_a_config_may_be_of_another_type(tmp_path):
    told = 0
    for _, config in edits(to_json(small_config())):
        write_json(tmp_path / "config.json", config)
        told += is_told(load_config, tmp_path)
    assert told > 300


ARRAYS = {
    "no numbers": lambda a: a.astype(str),
    "complex": lambda a: a.astype(complex) if a.dtype.kind == "f" else a.astype("S"),
    "objects": lambda a: a.astype(object),
    "not finite": lambda a: a * np.nan if a.dtype.kind == "f" else a[::-1][:0],
    "negative": lambda a: -1 - a if a.dtype.kind in "if" else a.view(np.uint32),
    "another shape": lambda a: a[None],
    "shorter": lambda a: a[:-1],
    "none": lambda a: a[:0],
    "one": lambda a: a[:1].squeeze(),
}


def test_predictions_of_other_types_are_shown_or_refused_in_a_line(runs):
    path = runs[1] / "predictions.npz"
    content = path.read_bytes()
    arrays = dict(np.load(path))
    broken = [content[:n] for n in range(0, len(content), 97)] + [content[::-1], content * 2]
    try:
        for other in broken:
            path.write_bytes(other)
            is_told(report.read_run, runs[1])
        for key in arrays:
            np.savez(path, **{k: v for k, v in arrays.items() if k != key})
            assert is_told(compared, runs)
            for change in ARRAYS.values():
                np.savez(path, **arrays | {key: change(arrays[key])})
                is_told(compared, runs)
    finally:
        path.write_bytes(content)


def test_broken_samples_are_left_out_of_a_report(runs):
    good = gray_images(range(3))
    path = runs[1] / report.SAMPLES
    np.save(path, good)
    content = path.read_bytes()
    for broken in (good.astype(float), good[:, :0], good.astype("U3"), good[0, 0, 0, 0]):
        np.save(path, broken)
        reported(runs)
    for broken in (b"", content[:40], content[:-1], b"\x93NUMPY" + b"{" * 99):
        path.write_bytes(broken)
        reported(runs)
    path.unlink()
