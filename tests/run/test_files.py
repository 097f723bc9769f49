"""A file that tells what happened is whole, and no name leads a write elsewhere."""

import contextlib
import os
import resource
from pathlib import Path

import pytest

from imgcls.errors import UserError
from imgcls.run.files import append_line, lock, replacing, write_bytes
from imgcls.run.logs import read_lines
from imgcls.run.workdir import read_json, write_json


def free_lock(path):
    return lock(path, busy=pytest.fail, refused=lambda why: f"no: {why}")


def test_a_file_takes_its_name_when_all_went_well(tmp_path):
    path = tmp_path / "file"
    for text, error in (
        ("one", None),
        ("two", ValueError),
        ("three", None),
        ("4", KeyboardInterrupt),
    ):
        try:
            with replacing(path) as file:
                file.write(text.encode())
                if error:
                    raise error
        except (ValueError, KeyboardInterrupt):
            pass
        assert path.read_text() == ("one" if text in ("one", "two") else "three")
        assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_the_rights_of_any_other(tmp_path):
    write_bytes(tmp_path / "ours", b"")
    (tmp_path / "any").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_links_are_replaced_or_refused_and_never_followed(tmp_path):
    (tmp_path / "elsewhere").write_text("kept")
    for name, target in (("link", "elsewhere"), ("dangling", "nowhere")):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(OSError):
            append_line(tmp_path / name, "more")
        with pytest.raises(UserError, match="no: Too many"), free_lock(tmp_path / name):
            raise AssertionError
        write_bytes(tmp_path / name, b"new")
        assert (tmp_path / name).read_text() == "new" and not (tmp_path / name).is_symlink()
    assert (tmp_path / "elsewhere").read_text() == "kept" and not (tmp_path / "nowhere").exists()


def test_only_regular_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    places = (
        tmp_path,
        tmp_path / "pipe",
        tmp_path / "file/x",
        Path("."),
        Path("/"),
        Path(os.devnull),
    )
    for path in places:
        with pytest.raises(OSError), replacing(path):
            raise AssertionError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]


def test_an_appended_line_stands_alone_whatever_a_kill_left(tmp_path):
    path = tmp_path / "lines"
    append_line(path, "one")
    with path.open("a") as file:
        file.write("to")
    append_line(path, "two")
    append_line(path, "drei ü")
    assert path.read_text(encoding="utf-8") == "one\nto\ntwo\ndrei ü\n"


def test_a_line_that_cannot_be_read_still_counts(tmp_path):
    path = tmp_path / "lines"
    assert read_lines(path) == []
    path.write_bytes(
        b'{"a": 1}\n\n{"b"\n\0\0\n[1]\n\xff{}\n{"c": "\xff"}\n' + b'{"a":' * 5000 + b"\n{}\n"
    )
    assert read_lines(path) == [{"a": 1}, *[{}] * 7]
    with path.open("ab") as file:
        file.write(b'{"torn')
    append_line(path, '{"d": 4}')
    assert read_lines(path)[8:] == [{}, {"d": 4}]


def test_json_that_is_right_already_is_not_written(tmp_path):
    path = tmp_path / "value.json"
    for value in ({"a": [1, 2.5]}, {"a": [1, 2.5]}, {"a": [1, 3]}):
        before = path.stat().st_ino if path.exists() else None
        write_json(path, value)
        assert read_json(path) == value
        assert (path.stat().st_ino == before) == (value == {"a": [1, 2.5]} and before is not None)


def test_a_lock_holds_without_the_number_that_a_full_disk_does_not_take(tmp_path):
    path = tmp_path / "lock"

    def refuse(process):
        raise TimeoutError

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with free_lock(path), pytest.raises(TimeoutError), lock(path, busy=refuse, refused=str):
            raise AssertionError
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b""


def test_a_lock_says_who_holds_it_and_is_free_afterwards(tmp_path):
    path, told = tmp_path / "lock", []

    def refuse(process):
        told.append(process)
        raise TimeoutError

    with free_lock(path), pytest.raises(TimeoutError), lock(path, busy=refuse, refused=str):
        raise AssertionError
    assert told == [str(os.getpid())]
    held = contextlib.ExitStack()
    held.enter_context(free_lock(path))
    with lock(path, busy=lambda _: held.close(), refused=str):  # which lets the wait end
        pass
