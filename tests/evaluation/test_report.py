"""The report: what it says, that it trusts no text, and that it works in a browser."""

import base64
import hashlib
import io
import json
import re
import shlex
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from imgcls.errors import UserError
from imgcls.evaluation import report
from imgcls.evaluation.mistakes import by_confidence
from tests.evaluation.browser import CHROMIUM, Browser
from tests.helpers import random_logits, write_run

HOSTILE = [
    "<script>document.title='broken'</script>",
    "\"><img src=x onerror=alert(1)>' onclick='x",
    "{{ 7 * 7 }} $\\frac{1}{2}$ &amp;",
    "\u202eright to left\u202c שלום",
    "two\nlines",
    "long " * 40,
    "--><style>*{display:none}</style>",
]


SPOTTED = {"split": "test", "row": 1, "suggested": HOSTILE[0], "p_suggested": 0.9}


class Page(HTMLParser):
    """tags: (name, attributes) in order; texts: what stands between them."""

    def __init__(self, path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags, self.texts = [], []
        self.feed(self.html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def of(self, tag, **attributes):
        items = attributes.items()
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in items)]

    @property
    def words(self):
        return " ".join(" ".join(self.texts).split())


def gray_images(positions):
    """Images of one pixel value each: the position that they were asked for."""
    return np.broadcast_to(
        np.asarray(positions, np.uint8)[:, None, None, None], (len(positions), 8, 8, 1)
    )


class Gray:
    """In the place of a split: the picture of a row has pixels of one value, the row."""

    def __init__(self, height=8, width=8):
        self.shape = height, width, 1

    def picture(self, row):
        return np.full(self.shape, row % 256, np.uint8)


SPLITS = {"test": Gray(), "validation": Gray()}


def write_report(workdir, samples=(), splits=SPLITS):
    if len(samples):
        np.save(workdir / report.SAMPLES, samples)
    return Page(report.write_report(workdir, splits))


def decode(uri):
    header, _, content = uri.partition(";base64,")
    assert header.startswith("data:image/")
    return base64.b64decode(content)


@pytest.fixture
def run(tmp_path):
    """A run with everything that a report can show."""
    workdir = write_run(
        tmp_path / "run",
        *random_logits(200, 7),
        temperature=1.3,
        config={"seed": 3, "data": {"name": "toy", "mean": [0.5]}, "model": {"name": "cnn"}},
        dataset="toy",
        split="test",
        checkpoint="latest",
        step=40,
        epochs=2,
        seed=3,
        seconds=75.0,
        images_per_second=1234.0,
        parameters=98765,
        device="4 x cpu",
        git_commit="c0ffee",
        versions={"jax": "0.10.2"},
    )
    rows = [
        {"epoch": e, "step": 20 * e, "split": split, "loss": 1 / e, "top1": 0.5, **extra}
        for e in (1, 2)
        for split, extra in [
            ("train", {"learning_rate": 0.1, "images_per_second": 1000.0}),
            ("validation", {"learning_rate": None, "images_per_second": None}),
        ]
    ]
    lines = [json.dumps(row) for row in rows]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + '\n{"epoch": 3, "spl')
    looks = [{"checkpoint": "latest", "step": 40, "time": f"2026-01-0{day}"} for day in (1, 2)]
    (workdir / "test_evaluations.jsonl").write_text("".join(json.dumps(x) + "\n" for x in looks))
    return workdir


def test_it_says_what_the_files_say(run):
    page = write_report(run, samples=gray_images([1, 2, 3]))
    results = json.loads((run / "results.json").read_text())
    low, high = results["top1_interval"]
    right = round(200 * results["top1"])
    for text in (
        f"{100 * results['top1']:.2f} %",
        f"of 200 examples are classified correctly: {right} right, {200 - right} wrong",
        f"{100 * low:.2f} to {100 * high:.2f} %",
        "98,765",
        "1 min 15 s",
        "evaluated 2 times",
        "2026-01-02",
        "0.10.2",
        "c0ffee",
        "At temperature 1.300",
        "Top-5 accuracy",
        "Validation top-1 50.00%",
        f"Always one class {100 * 29 / 200:.2f}% top-1 of always class 0",
    ):
        assert text in page.words, text
    captions = ["Loss", "Top-1 accuracy", "Learning rate", "Training images per second"]
    assert all(caption in page.texts for caption in captions)
    assert {"data", "mean", "[0.5]"} <= set(page.texts)
    assert len(page.of("ul", **{"class": "gallery samples"})) == 1


def test_the_galleries_show_calibrated_probabilities(tmp_path):
    logits, labels = random_logits(40, 4)
    mistake = (logits.argmax(1) != labels).nonzero()[0][0]
    for temperature in (None, 3.0):
        page = write_report(write_run(tmp_path, logits, labels, temperature=temperature))
        shown = np.exp(logits[mistake].astype(float) / (temperature or 1))
        assert f", {100 * shown.max() / shown.sum():.1f}%" in page.words
        assert ("how sure it was, calibrated" in page.words) == (temperature is not None)


def test_a_run_of_another_task_shows_its_figures_and_how_it_was_made(run):
    results = json.loads((run / "results.json").read_text())
    kept = {key: results[key] for key in ("examples", "class_names", "seed", "seconds", "versions")}
    kept |= {"figures": ["loss", "all right"], "loss": 1.25, "all right": 0.5}
    views = {"views": "flip", "loss": 1.125, "all right": 0.75}
    (run / "results.json").write_text(json.dumps(kept | {"test_time_augmentation": views}))
    page = write_report(run, samples=gray_images([1, 2, 3]))
    assert "1.2500 loss is the mean over 200 examples, 1.1250 with TTA (flip)." in page.words
    assert "all right 0.5000 0.7500 with TTA (flip) Training time 1 min 15 s" in page.words
    sections = re.findall("<h2>(.*?)</h2>", page.html)
    assert sections == ["Learning", "Training images", "How it was made"]


def test_galleries_hold_the_surest_mistakes_and_the_least_sure(tmp_path):
    """One example of each kind, by hand; image i has pixels of value i."""
    logits = np.array([[9, 0], [8, 0], [5, 0], [0, 0.1], [0, 7]], np.float32)
    labels = np.array([0, 1, 1, 1, 1], np.int32)
    page = write_report(write_run(tmp_path, logits, labels, ["no", "yes"]))
    images = [a for a in page.of("img") if a.get("title", "").startswith("test/")]
    pixels = [np.unique(Image.open(io.BytesIO(decode(a["src"])))).tolist() for a in images]
    assert pixels == [[1], [2], [3], [2], [4], [1], [0]]
    assert [a["title"] for a in images] == [f"test/{i}" for (i,) in pixels]
    assert f"no , {100 / (1 + np.exp(-8)):.1f}% is yes" in page.words


def with_heat(workdir, logits, labels, **options):
    """A run whose mistakes have maps of 2 x 3, as `looked_at` leaves them."""
    workdir = write_run(workdir, logits, labels, **options)
    mistakes = by_confidence(logits, labels, options.get("temperature"))[1]
    maps = np.zeros((len(mistakes), 2, 3), np.uint8)
    maps[:, 0, 0] = 255
    saved = dict(np.load(workdir / "predictions.npz"))
    np.savez(workdir / "predictions.npz", **saved, mistakes=mistakes, looked_at=maps)
    return workdir


def test_photographs_are_shown_larger_and_where_it_looked_lies_over_each_mistake(tmp_path):
    logits, labels = random_logits(900, 7)
    workdir = with_heat(tmp_path, logits, labels)
    page = write_report(workdir, splits={"test": Gray(900, 1200)})
    shown = [Image.open(io.BytesIO(decode(a["src"]))) for a in page.of("img") if "title" in a]
    assert [(image.format, image.size) for image in shown] == [("JPEG", (256, 192))] * (24 + 24)
    assert len(page.of("ul", **{"class": "gallery large"})) == 2
    heats = page.of("img", **{"class": "heat"})
    assert len(heats) == 24 < (logits.argmax(1) != labels).sum()
    heat = np.array(Image.open(io.BytesIO(decode(heats[0]["src"])))).astype(int)
    assert heat.shape == (48, 64, 4)
    red, blue, alpha = (heat[..., k] for k in (0, 2, 3))
    assert red[0, 0] > blue[0, 0] and red[-1, -1] < blue[-1, -1] and (alpha == 127).all()


def test_paths_stand_whole_below_the_pictures_and_below_labels_that_may_be_wrong(tmp_path):
    path = "a class/" + "long" * 50 + ": 1.jpg"
    issue = {"split": "validation", "row": 200, "id": "train:x/9.png", "given": "dog"}
    issue |= {"p_given": 0.1, "suggested": "cat", "p_suggested": 0.75}
    issues = {"examples": 40, "first": [issue, issue | {"split": "elsewhere"}]}
    ids = [f"test:{path}", "b", "7"]
    page = write_report(write_run(tmp_path, *random_logits(3, 3), ids=ids, label_issues=issues))
    assert {path, "b", "7"} <= set(page.texts)
    titles = {a["title"] for a in page.of("code", **{"class": "name"})}
    assert titles == {*ids, "train:x/9.png"}
    assert (
        "contradicts the labels of 40 examples" in page.words and "The first 1, with" in page.words
    )
    assert "cat , 75.0% validation, labelled dog x/9.png" in page.words
    (image,) = (a["src"] for a in page.of("img", title="train:x/9.png"))
    assert np.unique(Image.open(io.BytesIO(decode(image)))) == 200
    assert not page.of("label") and not page.of("ul", **{"class": "gallery large"})


def test_a_perfect_model_has_no_mistakes_to_show(tmp_path):
    page = write_report(write_run(tmp_path, 5 * np.eye(3, dtype=np.float32), np.arange(3)))
    assert "every example is classified correctly" in page.words


def test_hostile_texts_stay_texts(tmp_path):
    logits, labels = random_logits(70, len(HOSTILE))
    hostile = HOSTILE[1]
    workdir = write_run(
        tmp_path / "<b>&run",
        logits,
        labels,
        HOSTILE,
        ids=[f"{hostile}{i}" for i in range(70)],
        config={"data": {"name": hostile, hostile: [HOSTILE[0]]}},
        dataset=HOSTILE[0],
        device=hostile,
        versions={hostile: hostile},
        checkpoint=hostile,
        label_issues={"examples": 1, "first": [dict.fromkeys(("id", "given"), hostile) | SPOTTED]},
    )
    line = {"epoch": 1, "split": HOSTILE[0], "loss": 1.0}
    (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    page = write_report(workdir)
    clean = write_report(write_run(tmp_path / "clean", logits, labels))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in clean.tags}
    assert len(page.of("script")) == 1 and len(page.of("style")) == 1
    known = {
        "src",
        "srcset",
        "href",
        "content",
        "class",
        "title",
        "alt",
        "id",
        "name",
        "data-value",
    }
    known |= {"tabindex"} | {
        "charset",
        "lang",
        "rel",
        "media",
        "width",
        "height",
        "type",
        "scope",
        "http-equiv",
    }
    assert {key for _, attributes in page.tags for key in attributes} <= known
    titles = {a.get("title") for a in page.of("bdi")}
    for name in HOSTILE:
        shown = " ".join(name.split())
        assert name in page.texts or (name in titles and f"{shown[:30]}" in page.words), name
    assert all(decode(a["src"]) for a in page.of("img"))


def test_no_name_enters_a_figure(tmp_path):
    names = [f"name {k} $x_1$" for k in range(7)]
    page = write_report(write_run(tmp_path, *random_logits(70, 7), names))
    figures = [a["src"] for a in page.of("img")] + [a["srcset"] for a in page.of("source")]
    drawings = [decode(uri).decode() for uri in figures if uri.startswith("data:image/svg")]
    assert len(drawings) == 6
    assert not any("name" in re.sub("(?i)font-family|fontname", "", text) for text in drawings)


@pytest.mark.parametrize("surrogate", ["caf\udce9"])
def test_file_names_that_are_not_utf8_are_shown_as_far_as_they_go(tmp_path, surrogate):
    page = write_report(write_run(tmp_path, *random_logits(10, 2), [surrogate, "b"]))
    assert "caf?" in page.texts


def test_the_policy_admits_nothing_from_elsewhere(run):
    page = write_report(run, samples=gray_images([1]))
    (meta,) = page.of("meta", **{"http-equiv": "Content-Security-Policy"})
    assert page.html.index("Content-Security-Policy") < page.html.index("<style>")
    policy = dict(part.strip().split(" ", 1) for part in meta["content"].split(";"))
    assert policy["default-src"] == "'none'" and policy["img-src"] == "data:"
    for tag in ("style", "script"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", page.html, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    for _, attributes in page.tags:
        assert "style" not in attributes
        for key in {"src", "srcset", "href"} & attributes.keys():
            assert attributes[key].startswith("data:")
    assert not re.search(r"url\(|@import|https?:", re.sub(r"base64,[^\"]*", "", page.html))


@pytest.mark.parametrize("classes", [2, 5])
def test_of_few_classes_there_is_no_top_5(tmp_path, classes):
    page = write_report(write_run(tmp_path, *random_logits(50, classes)))
    cells = [a for a in page.of("td") if "heat" in a.get("class", "")]
    assert len(cells) == classes**2
    assert "Top-5 accuracy" not in page.texts


def test_a_hundred_classes_are_a_picture_and_their_worst_pairs(tmp_path):
    logits, labels = random_logits(1000, 100)
    logits[labels == 7] = 0
    logits[labels == 7, 42] = 9
    logits[labels == 99] = -9
    logits[labels == 99, 99] = 9
    page = write_report(write_run(tmp_path, logits, labels))
    assert not [a for a in page.of("td") if "heat" in a.get("class", "")]
    (matrix,) = page.of("img", alt="Confusion matrix of 100 classes")
    pixels = np.array(Image.open(io.BytesIO(decode(matrix["src"]))))
    assert pixels.shape == (100, 100, 4)
    assert pixels[99, 99, 3] == 255 and pixels[99, 0, 3] == 0 and pixels[7, 7, 3] == 0
    assert pixels[7, 42, 3] == pixels[~np.eye(100, dtype=bool)][:, 3].max() > 150
    assert "Confused most often Truth Prediction Examples % of class class 7 class 42 10 100.0" in (
        page.words
    )
    assert len(page.of("th", scope="row")) == 102
    assert "94 more in grey" in page.texts


def test_an_absent_class_has_no_scores(tmp_path):
    logits, labels = random_logits(60, 4)
    page = write_report(write_run(tmp_path, logits[labels != 2], labels[labels != 2]))
    assert "–" in page.texts
    assert "" in {a["data-value"] for a in page.of("td") if "data-value" in a}


def test_a_run_without_validation_history_or_samples(tmp_path):
    page = write_report(write_run(tmp_path, *random_logits(30, 3)))
    assert "No temperature was fitted" in page.words
    assert not {"Learning", "Training images"} & set(page.texts)


def test_it_overwrites_the_page_and_only_the_page(run):
    before = {path: path.read_bytes() for path in run.iterdir()}
    write_report(run)
    write_report(run)
    after = {path: path.read_bytes() for path in run.iterdir()}
    assert after.keys() - before.keys() == {run / "report.html"}
    assert all(after[path] == content for path, content in before.items())


def test_files_that_are_missing_or_broken_are_named(run):
    predictions = run / "predictions.npz"
    content = predictions.read_bytes()
    labels = np.zeros(200, np.int32)

    def fails(match):
        with pytest.raises(UserError, match=match) as error:
            write_report(run)
        assert "\n" not in str(error.value)

    predictions.unlink()
    fails("predictions.npz does not exist: .*python -m imgcls evaluate --workdir=")
    predictions.write_bytes(content[: len(content) // 2])
    fails("predictions.npz is broken")
    np.savez(predictions, logits=np.zeros((3, 7)), labels=labels, ids=labels)
    fails("predictions.npz is broken .its shapes are not those of results.json")
    np.savez(predictions, logits=np.zeros((200, 7)), labels=labels, ids=np.array([None] * 200))
    fails("predictions.npz is broken .*allow_pickle")
    predictions.write_bytes(content)
    (run / "results.json").write_text("[]")
    fails("results.json is broken")
    (run / "report.html").mkdir()
    write_run(run, *random_logits(200, 7))
    fails("cannot write .*report.html: it is not a regular file")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (9.26, "9.3 s"), (245, "4 min 05 s"), (3600, "1 h 00 min"), (7384, "2 h 03 min")],
)
def test_durations(seconds, text):
    assert report.duration(seconds) == text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed")
def test_in_a_browser(tmp_path):
    logits, labels = random_logits(140, 7)
    logits, labels = logits[labels != 2], labels[labels != 2]
    names = {"class_names": HOSTILE, "ids": [f"test:{'long' * 30}/{i}" for i in range(len(labels))]}
    workdir = with_heat(tmp_path / "run", logits, labels, **names, temperature=1.2)
    write_report(workdir, samples=gray_images(range(8)), splits={"test": Gray(90, 120)})
    with Browser() as browser:
        for width, scheme in [(1200, "light"), (390, "dark")]:
            browser.open(workdir / "report.html", width=width, scheme=scheme)
            assert browser.evaluate("document.title") != "broken"
            assert not browser.happened("Log.entryAdded", "Runtime.exceptionThrown")
            requests = browser.happened("Network.requestWillBeSent")
            schemes = {event["request"]["url"].partition(":")[0] for event in requests}
            assert schemes <= {"file", "data"}
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate(
                "[...document.images].every(i => i.complete && i.naturalWidth > 0)"
            )
        paper = browser.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert sum(map(int, re.findall(r"\d+", paper))) < 150  # dark
        shade = "+getComputedStyle(document.querySelector('.heat')).opacity"
        assert browser.evaluate(shade) == 0
        browser.evaluate("document.querySelector('input').click()")
        assert browser.evaluate(shade) == 1
        boxes = (
            "[...document.querySelector('.picture').children].map(i => i.getBoundingClientRect())"
        )
        size = f"{boxes}.map(b => [b.x, b.y, b.width, b.height].join())"
        assert len(set(browser.evaluate(size))) == 1  # the one over the other
        recall = (
            "[...document.querySelectorAll('#classes tbody tr')].map(r => r.cells[2].innerText)"
        )
        unsorted = browser.evaluate(recall)
        press = "document.querySelectorAll('#classes th button')[2].click()"
        numbers = sorted(float(value) for value in unsorted if value != "–")
        for expected in (numbers, numbers[::-1]):
            browser.evaluate(press)
            *values, last = browser.evaluate(recall)
            assert [float(value) for value in values] == expected != unsorted
            assert last == "–"  # the absent class stays last either way
        browser.evaluate("document.querySelectorAll('#classes th button')[0].click()")
        assert browser.evaluate(recall) == unsorted


def test_the_command_of_a_remedy_can_be_typed(tmp_path):
    workdir = tmp_path / "a run; mine"
    workdir.mkdir()
    (workdir / "config.json").write_text("{}")
    with pytest.raises(UserError) as told:
        report.read_run(workdir)
    assert shlex.split(str(told.value))[-4:] == ["-m", "imgcls", "evaluate", f"--workdir={workdir}"]
