import csv
import sys
import unicodedata
from pathlib import Path

import pytest

from imgcls.data.sources import open_sources
from tests.data.test_sources import content, make_folder, refusal


def open_table(path, **options):
    return open_sources("table", data_dir=str(path), **{"channels": 3} | options)


def write_table(folder: Path, rows, header=("path", "label"), delimiter=",") -> Path:
    path = folder / "labels.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


@pytest.fixture
def rows(tmp_path) -> list[tuple[str, str]]:
    make_folder(tmp_path, {"cat": 20, "dog": 12})
    return [
        (f"{name}/{n}.png", name)
        for name, count in (("cat", 20), ("dog", 12))
        for n in range(count)
    ]


def test_a_table_without_splits_is_divided_as_its_folder_is(tmp_path, rows):
    tables = open_table(write_table(tmp_path, rows))
    folders = open_sources("image_folder", data_dir=str(tmp_path), channels=3)
    for name, source in folders.items():
        assert tables[name].ids == source.ids and tables[name].class_names == ("cat", "dog")
        assert content(tables[name]) == content(source)
        assert tables[name].fingerprint == source.fingerprint


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("header", [("Image_ID", "Class Name"), ("filename", "species")])
def test_columns_go_by_usual_names_in_any_order(header, delimiter, tmp_path, rows):
    turned = [(label, "more, and more", path) for path, label in rows]
    header = (header[1], "other", header[0])
    sources = open_table(write_table(tmp_path, turned, header, delimiter))
    assert sum(map(len, sources.values())) == 32
    columns = f"columns read: {header[2]} as path, {header[0]} as label; not read: other"
    assert columns in sources["train"].describe()


def test_a_column_of_splits_divides(tmp_path, rows):
    split = lambda n: ("Training", "Testing", "train", "val")[n % 4]
    table = write_table(
        tmp_path, [(*r, split(n)) for n, r in enumerate(rows)], ("path", "label", "Set")
    )
    lengths = {name: len(source) for name, source in open_table(table).items()}
    assert lengths == {"train": 16, "test": 8, "validation": 8}
    halves = [(*r, ("train", "val")[n % 2]) for n, r in enumerate(rows)]
    sources = open_table(write_table(tmp_path, halves, ("path", "label", "split")))
    assert {name: len(s) for name, s in sources.items()} == {
        "train": 14,
        "test": 16,
        "validation": 2,
    }
    assert any("val is the test split" in line for line in sources["test"].describe())


@pytest.mark.parametrize(
    ("header", "row", "words"),
    [
        (("a", "b"), ("x", "y"), ["the columns a, b", "path, label"]),
        (("path", "label"), ("cat/0.png", "dog"), ["line 34", "cat/0.png again"]),
        (("path", "label"), ("cat/99.png", "cat"), ["1 of 33 files", "cat/99.png"]),
        (("path", "label"), ("cat/99.png", " "), ["line 34 lacks"]),
        (("path", "label"), ("cat/99.png",), ["line 34 has 1 values for 2 columns"]),
        (("path", "label"), ('"cat', "x", 'y"z'), ["line 34"]),
        (("split", "path", "label"), ("cat", "cat", "cat"), ["2 values for 3 columns"]),
    ],
)
def test_what_is_wrong_in_a_table_is_named_with_its_line(header, row, words, tmp_path, rows):
    refusal(lambda: open_table(write_table(tmp_path, [*rows, row], header)), "labels.csv", *words)


def test_no_table_and_splits_that_are_none_are_refused(tmp_path, rows):
    refusal(lambda: open_table(tmp_path / "gone.csv"), "gone.csv", "No such file")
    refusal(lambda: open_table(tmp_path), "Is a directory", "path, label")
    refusal(lambda: open_table(tmp_path / "cat/0.png"), "0.png", "UTF-8")
    refusal(lambda: open_sources("table", data_dir=None, channels=3), "--config.data.dir=FILE.csv")
    for split, words in (("fold 3", ["line 2", "'fold 3'"]), ("test", ["no example of train"])):
        table = write_table(tmp_path, [(*row, split) for row in rows], ("path", "label", "split"))
        refusal(lambda table=table: open_table(table), *words)
    (tmp_path / "empty.csv").touch()
    refusal(lambda: open_table(tmp_path / "empty.csv"), "empty file")
    (tmp_path / "cat/0.png").unlink()
    (tmp_path / "cat/0.png").symlink_to(tmp_path / "cat/1.png")
    refusal(lambda: open_table(write_table(tmp_path, rows), follow_links=False), "is a link")


def test_a_picture_is_one_however_its_path_is_spelled(tmp_path, rows):
    expected = {k: s.ids for k, s in open_table(write_table(tmp_path, rows)).items()}
    spelled = [(f"./cat/..//{path}", label) for path, label in rows]
    found = open_table(write_table(tmp_path, spelled))
    assert {k: s.ids for k, s in found.items()} == expected
    spelled = [(path.replace("/", "\\"), label) for path, label in rows]  # by Windows
    assert open_table(write_table(tmp_path, spelled))["test"].ids == expected["test"]
    for again in (f"./{rows[0][0]}", "dog/../cat/0.png", str(tmp_path / "cat/0.png")):
        table = write_table(tmp_path, [*rows, (again, "cat")])
        refusal(lambda table=table: open_table(table), "line 34", "cat/0.png again")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_paths_are_found_in_either_unicode_normal_form(form, tmp_path):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    names = [unicodedata.normalize(form, name) for name in ("caf\u00e9", "\u00fcber")]
    make_folder(tmp_path, dict.fromkeys(names, 9))
    rows = [(f"{name}/{n}.png", name) for name in names for n in range(9)]
    written = [[unicodedata.normalize(other, text) for text in row] for row in rows]
    found, expected = (open_table(write_table(tmp_path, x)) for x in (written, rows))
    assert found["train"].ids == expected["train"].ids
    assert content(found["train"]) == content(expected["train"])


def test_a_linked_folder_in_a_path_is_a_link_too_and_folders_to_ignore_are_refused(tmp_path, rows):
    (tmp_path / "cat").rename(tmp_path / "elsewhere")
    table = write_table(tmp_path, rows)
    (tmp_path / "cat").symlink_to("elsewhere")
    assert len(open_table(table)["train"]) == 26
    refusal(lambda: open_table(table, follow_links=False), "labels.csv, line 2 is a link")
    refusal(lambda: open_table(table, ignore="cat"), "config.data.ignore")
    table = write_table(tmp_path, [*rows, ("cat/\0.png", "cat")])
    refusal(lambda: open_table(table, follow_links=False), "line 2 is a link")
    refusal(lambda: open_table(table), "1 of 33 files", r"cat/\x00.png")


def test_a_parquet_file_is_read_as_the_csv_of_its_columns_is(tmp_path, rows):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is optional")
    pyarrow = pytest.importorskip("pyarrow")
    split = [("train", "test", "val")[n % 3] for n in range(len(rows))]
    paths, labels = zip(*rows)
    columns = {"Image": [{"bytes": b"..."}] * len(rows), "file_name": paths, "Label": labels}
    table = tmp_path / "labels.parquet"
    parquet.write_table(pyarrow.table(columns | {"split": split}), table)
    expected = open_table(write_table(tmp_path, [(*r, s) for r, s in zip(rows, split)],
                                      ("path", "label", "split")))  # fmt: skip
    found = open_table(table)
    assert {k: s.fingerprint for k, s in found.items()} == {
        k: s.fingerprint for k, s in expected.items()
    }
    columns["Label"] = [*labels[:-1], None]
    parquet.write_table(pyarrow.table(columns), table)
    refusal(lambda: open_table(table), "labels.parquet, row 32 lacks")
    table.write_bytes(b"PAR1")
    refusal(lambda: open_table(table), "labels.parquet is no Parquet file")


def test_a_parquet_file_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refusal(lambda: open_table(tmp_path / "x.parquet"), "x.parquet", "pip install pyarrow")
