"""Decoded once, then read: the cache gives what decoding gives, or decodes."""

import errno
import fcntl
import hashlib
import io
import os

import numpy as np
import pytest
from PIL import Image

from imgcls.data import cache
from imgcls.data.sources import open_sources
from imgcls.errors import UserError
from tests.data.test_splits import Numbers, load, numbers
from tests.helpers import all_images


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the entries are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/imgcls/datasets"


def one_entry(folder):
    load({"train": Numbers(10)}, "train")
    (entry,) = folder.iterdir()
    return entry


def is_right(*, decodes: bool) -> bool:
    source = Numbers(10)
    (split,) = load({"train": source}, "train")
    right = numbers(split) == list(range(10)) and (split.labels == np.arange(10) % 2).all()
    return right and source.reads == (10 if decodes else 0)


def make_folder(root, shade):
    """Uncompressed pictures, so that all files are of one size, and of one time."""
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (4, 4), (shade, 100 * label, i)).save(root / name / f"{i}.bmp")
            os.utime(root / name / f"{i}.bmp", (315532800, 315532800))


def load_folder(root):
    """The pixels of train as the source has them, and as they are loaded."""
    sources = open_sources("image_folder", data_dir=str(root), channels=3)
    (train,) = load(sources, "train", channels=3)
    return np.stack([s["image"] for s in map(sources["train"].__getitem__, range(6))]), train


def test_folders_of_the_same_names_sizes_and_times_share_nothing(tmp_path):
    for root, shade in (("first", 10), ("second", 200)):
        make_folder(tmp_path / root, shade)
        on_disk, train = load_folder(tmp_path / root)
        np.testing.assert_array_equal(on_disk, all_images(train))
    a, b, between = (tmp_path / "first" / name for name in ("cat/0.bmp", "dog/0.bmp", "x"))
    for old, new in ((a, between), (b, a), (between, b)):  # two labels are swapped
        old.rename(new)
    on_disk, train = load_folder(tmp_path / "first")
    np.testing.assert_array_equal(on_disk, all_images(train))


def test_a_copy_of_the_data_shares_the_entry(tmp_path, folder):
    for root in ("first", "second"):
        make_folder(tmp_path / root, 10)
        os.utime(tmp_path / root / "cat/0.bmp", (len(root), len(root)))
        load_folder(tmp_path / root)
    assert len(list(folder.iterdir())) == 1


def another_array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros((10, 4, 4, 1), np.float64))
    return file.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: bytes(len(content)),
        lambda content: content[:80] + bytes(40) + content[120:],
        lambda content: content[:160] + content[160:][::-1],
        lambda content: content.replace(np.arange(2, dtype="<i4").tobytes(), b"\1" + bytes(7)),
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: another_array(),
        lambda content: another_array() * 9,
    ],
)
def test_an_entry_that_is_not_what_was_written_is_decoded_again(damage, folder, caplog):
    entry = one_entry(folder)
    content = entry.read_bytes()
    assert damage(content) != content
    entry.write_bytes(damage(content))
    assert is_right(decodes=True) and "is damaged: decoding again" in caplog.text
    assert entry.read_bytes() == content and is_right(decodes=False)


def test_any_flipped_bit_is_noticed(folder, caplog):
    entry = one_entry(folder)
    content = entry.read_bytes()
    for place in range(0, len(content), 37):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        entry.write_bytes(flipped)
        assert is_right(decodes=True)


def test_an_entry_under_another_s_name_is_not_used(folder):
    entry = one_entry(folder)
    load({"train": Numbers(10, fingerprint="other", label=lambda i: 0)}, "train")
    (other,) = set(folder.iterdir()) - {entry}
    entry.write_bytes(other.read_bytes())
    assert is_right(decodes=True)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_an_entry_that_others_can_write_is_not_used(mode, folder, caplog):
    entry = one_entry(folder)
    assert entry.stat().st_mode & 0o777 == 0o600
    entry.chmod(mode)
    assert is_right(decodes=True) and "can be written by other users" in caplog.text
    assert is_right(decodes=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_an_entry_of_another_user_is_not_used(folder, caplog):
    os.chown(one_entry(folder), 12345, 12345)
    assert is_right(decodes=True) and "can be written by other users" in caplog.text
    assert is_right(decodes=False)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("function", ["open", "pread"])
def test_an_error_that_is_no_damage_leaves_the_entry(function, code, folder, monkeypatch, caplog):
    entry = one_entry(folder)
    before, original = (entry.stat().st_ino, entry.read_bytes()), getattr(os, function)

    def fail(file, *arguments, **options):
        if function == "pread" or str(file) == str(entry):
            raise OSError(code, os.strerror(code))
        return original(file, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        assert is_right(decodes=True) and "cannot cache" in caplog.text
    assert (entry.stat().st_ino, entry.read_bytes()) == before and is_right(decodes=False)


def test_an_entry_that_is_no_file_is_left_alone(folder, caplog):
    for make in (os.mkdir, os.mkfifo):
        entry = one_entry(folder)
        entry.unlink()
        make(entry)
        assert is_right(decodes=True) and not entry.is_file() and "cannot cache" in caplog.text
        entry.rmdir() if entry.is_dir() else entry.unlink()
        caplog.clear()


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert is_right(decodes=True)


def test_what_killed_writers_left_is_deleted_but_not_what_one_is_writing(folder):
    folder.mkdir(parents=True)
    (folder / ".tmp-dead").write_bytes(b"1234")
    with (folder / ".tmp-live").open("wb") as live:
        fcntl.flock(live, fcntl.LOCK_EX)
        load({"train": Numbers(10)}, "train")
        assert not (folder / ".tmp-dead").exists() and (folder / ".tmp-live").exists()
    load({"train": Numbers(10)}, "train[:5]")
    assert not (folder / ".tmp-live").exists()


def test_the_least_recently_used_entries_go_first_and_never_one_in_use(folder, monkeypatch):
    def use(name):
        (split,) = load({name: Numbers(10, fingerprint=name)}, name)
        return split

    def there():
        return {entry.name.partition("-")[0] for entry in folder.iterdir()}

    for age, name in enumerate("abcd"):
        use(name)
        (entry,) = folder.glob(f"{name}-*")
        os.utime(entry, (10**9 - age, 10**9 - age))
    in_use = use("d")
    os.utime(next(folder.glob("d-*")), (1, 1))  # the oldest by far
    use("b")  # the newest now
    monkeypatch.setattr(cache, "CACHE_BYTES", 2 * entry.stat().st_size)
    use("e")
    assert there() == {"b", "d", "e"} and numbers(in_use) == list(range(10))
    del in_use
    use("f")
    assert there() == {"e", "f"}
    monkeypatch.setattr(cache, "CACHE_BYTES", 0)
    use("g")
    assert there() == {"g"}


def test_what_is_skipped_is_said_each_time_and_read_again_each_time(caplog):
    for _ in range(3):
        (split,) = load({"train": Numbers(10, bad=(3, 5))}, "train", skip_bad=2)
        assert numbers(split) == [0, 1, 2, 4, 6, 7, 8, 9]
        assert "skipped: 3.png" in caplog.text and "skipped: 5.png" in caplog.text
        caplog.clear()
    with pytest.raises(UserError, match=r"2 unreadable.*3\.png is not.*5\.png.*skip_bad=2"):
        load({"train": Numbers(10, bad=(3, 5))}, "train", skip_bad=1)
    # Readable now: permissions were given, or the error has passed.
    (split,) = load({"train": Numbers(10, bad=(5,))}, "train", skip_bad=2)
    assert numbers(split) == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert "skipped: 5.png" in caplog.text and "3.png" not in caplog.text
    (split,) = load({"train": Numbers(10)}, "train")
    assert numbers(split) == list(range(10)) and is_right(decodes=False)


def test_data_that_cannot_be_identified_is_not_cached(tmp_path, folder, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    make_folder(tmp_path / "data", 10)
    monkeypatch.setattr(hashlib, "file_digest", fail)
    on_disk, train = load_folder(tmp_path / "data")
    np.testing.assert_array_equal(on_disk, all_images(train))
    assert not any(folder.iterdir())


def test_what_was_decoded_is_kept_when_too_many_are_unreadable():
    for _ in range(2):
        source = Numbers(10, bad=(3, 5))
        with pytest.raises(UserError, match="2 unreadable"):
            load({"train": source}, "train", skip_bad=1)
    assert source.reads == 2
    source = Numbers(10, bad=(3, 5))
    (split,) = load({"train": source}, "train", skip_bad=2)
    assert source.reads == 2 and numbers(split) == [0, 1, 2, 4, 6, 7, 8, 9]
