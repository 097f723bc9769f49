"""A table of pictures: a CSV or Parquet file with the columns path, label and perhaps split."""

import csv
import os
import re
import unicodedata
from typing import Any

from imgcls.data.divide import Splits, complete, nfc
from imgcls.data.folder import FolderSource, check, letters, split_names
from imgcls.errors import UserError, first_line, printable

COLUMNS = {  # names of a column, of which only the letters count
    "path": "path file filename filepath image imagepath imagename imageid img id",
    "label": "label labels class classname category target species breed diagnosis",
    "split": "split set subset dataset partition",
}
LAYOUT = "a table has the columns path, label and perhaps split"


def open_table(
    *, data_dir: str | None, channels: int, follow_links: bool = True, ignore: str = "", **how: Any
) -> dict[str, FolderSource]:
    """Opens the splits of a table. Paths are relative to its folder, labels number sorted classes.

    Splits are carved where there are none, as in a folder of images.

    Raises:
        UserError: no such file, column or picture, a picture twice, a row without a label, a name
            of no split, a link when `follow_links` is False, and as `open_folder`.
    """
    if data_dir is None:
        raise UserError(f"table needs --config.data.dir=FILE.csv (or .parquet); {LAYOUT}")
    if ignore:
        raise UserError("config.data.ignore is for image_folder: leave rows out of the table")
    table = os.path.expanduser(data_dir)
    root, shown, validation = os.path.dirname(table), printable(table), ""
    base = os.path.realpath(root)
    splits, seen, missing = Splits(), set[str](), list[str]()
    rows, told = _read(table, shown)
    for line, path, label, split in rows:
        where = f"{shown}, {line}"
        if not path or not label:
            raise UserError(f"{where} lacks a path or a label: complete or remove it")
        path = os.path.normpath(path)
        forms = (path, nfc(path), unicodedata.normalize("NFD", path), path.replace("\\", "/"))
        there = [one for one in dict.fromkeys(forms) if os.path.isfile(os.path.join(root, one))]
        path = (there or [path])[0]
        file = os.path.normpath(os.path.join(base, path))
        if nfc(file) in seen:
            raise UserError(f"{where} has {printable(path)} again: keep one line of each picture")
        if not (name := split_names([split]).get(split)):
            raise UserError(f"{where} has the split {printable(split)!r}: write train, val or test")
        if there and not follow_links and os.path.realpath(file) != file:
            raise UserError(f"{where} is a link, which config.data.follow_links=False refuses")
        missing += [] if there else [path]
        validation = split if name == "validation" else validation
        seen.add(nfc(file))
        splits.setdefault(name, {}).setdefault(nfc(label), []).append(path)
    if missing:
        raise UserError(
            f"{shown} has {len(missing):,} of {len(seen):,} files that are not there, the first "
            f"{printable(missing[0])}: paths are relative to the folder of the table"
        )
    if "train" not in splits:
        raise UserError(f"{shown} has no example of train")
    read = lambda part: FolderSource(root, part, [*part], 3)
    splits, notes = complete(splits, validation, read, **how)
    own = (check(shown, splits, folders=False), channels, [told, *notes])
    return {name: FolderSource(root, split, *own) for name, split in splits.items()}


def _read(table: str, shown: str) -> tuple[list[tuple[str, str, str, str]], str]:
    """Place, path, label and split (train, where no column tells) of each row; what was read."""
    parquet = re.search(r"\.(parquet|pq)$", table, re.I)
    try:
        if parquet:
            header, rows = _read_parquet(table)
        else:
            with open(table, encoding="utf-8-sig", newline="") as file:
                head = file.readline()
                file.seek(0)
                reader = csv.reader(file, delimiter=max(",;\t", key=head.count), strict=True)
                header = next(reader, [])
                rows = [(f"line {reader.line_num}", row) for row in reader if any(row)]
    except (OSError, ValueError, NotImplementedError, csv.Error) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        kind = "Parquet file" if parquet else "CSV file in UTF-8"
        raise UserError(f"{shown} is no {kind} ({why}); {LAYOUT}") from error
    except ImportError:
        raise UserError(f"{shown} needs pyarrow to be read: pip install pyarrow") from None
    names = [letters(name) for name in header]
    found = {k: [names.index(n) for n in v.split() if n in names] for k, v in COLUMNS.items()}
    if not found["path"] or not found["label"]:
        has = ", ".join(map(printable, header[:20]))
        raise UserError(f"{shown} has the columns {has or 'of an empty file'}; {LAYOUT}")
    for line, row in rows:
        if len(row) != len(header):
            counts = f"{len(row)} values for {len(header)} columns"
            raise UserError(f"{shown}, {line} has {counts}: quote values with commas")
    cell = lambda row, column: row[found[column][0]].strip()
    split = lambda row: cell(row, "split") if found["split"] else "train"
    used = {header[places[0]]: column for column, places in found.items() if places}
    told = ", ".join(f"{printable(name)} as {column}" for name, column in used.items())
    others = ", ".join(printable(name) for name in header if name and name not in used)
    told = f"columns read: {told}" + f"; not read: {others}" * bool(others)
    return [(line, cell(row, "path"), cell(row, "label"), split(row)) for line, row in rows], told


def _read_parquet(table: str) -> tuple[list[str], list[tuple[str, list[str]]]]:
    from pyarrow import parquet  # optional

    with parquet.ParquetFile(table) as file:
        names = file.schema_arrow.names
        known = [name for name in names if letters(name) in " ".join(COLUMNS.values()).split()]
        rows = enumerate(file.read(columns=known).to_pylist(), 1)
    text = lambda row: ["" if row.get(name) is None else str(row[name]) for name in names]
    return names, [(f"row {number}", text(row)) for number, row in rows]
