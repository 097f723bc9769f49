"""A file that tells what happened is whole, and no name leads a write elsewhere."""

import contextlib
import os
from pathlib import Path

import pytest

from imgcls.errors import UserError
from imgcls.run.files import append_line, lock, replacing, write_bytes


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
    append_line(path, "two", sync=True)
    append_line(path, "drei ü")
    assert path.read_text(encoding="utf-8") == "one\nto\ntwo\ndrei ü\n"


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
