"""What a terminal shows of a run."""

import contextlib
import fcntl
import os
import re
import struct
import sys
import termios
from types import SimpleNamespace

import pytest

from imgcls.run.logs import MetricWriter, progress, read_metrics, say
from imgcls.train import log_row


def on_a_terminal(columns, show, monkeypatch):
    """What `show()` prints on stderr, where that is a terminal of so many columns."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(theirs, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        show()
    printed = b""
    with contextlib.suppress(OSError), open(ours, "rb", buffering=0) as stream:
        while chunk := stream.read(2**16):
            printed += chunk
    return printed.decode()


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_progress_bar_keeps_its_bar_the_count_and_the_time_left_and_fits(monkeypatch, columns):
    config = SimpleNamespace(train=SimpleNamespace(epochs=50))
    exp = SimpleNamespace(total_steps=19500, steps_per_epoch=390, config=config, schedule=float)
    log = SimpleNamespace(
        writer=SimpleNamespace(write=lambda row: None), window=SimpleNamespace(bad_steps=[])
    )
    log.clock = SimpleNamespace(seconds=1234.5, train_seconds=1200.0)
    sums = {"count": 1.0, "loss": 1.23456, "top1": 0.51234}

    def show():
        with progress(exp.total_steps, "training", "steps") as log.bar:
            log.bar.update(9876)
            log_row(exp, log, 9876, "train", sums, 12345.6)
            log_row(exp, log, 9876, "validation", sums, 12345.6)

    lines = re.split("[\\r\\n]+", on_a_terminal(columns, show, monkeypatch))
    assert max(map(len, lines)) < columns
    shown = [line for line in lines if "loss" in line]
    assert shown and all(
        re.match(r" 51%\|.{8}\| 9876/19500 \[\d\d:\d\d<.+\] loss", x) for x in shown
    )
    assert columns < 80 or all("loss 1.2346  top1 0.5123" in line for line in shown)
    assert columns < 200 or "epoch 25.32/50  12346 images/s" in shown[-1]


def test_rows_are_on_the_disk_before_their_checkpoint(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    with contextlib.closing(MetricWriter(tmp_path, start_step=0, validated_step=0)) as writer:
        synced.clear()
        writer.write({"step": 1, "epoch": 0.5, "split": "train", "loss": 1e30})
        assert (tmp_path / "metrics.jsonl").stat().st_ino in synced
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == 1e30


def test_names_for_programs_have_their_spaces_and_no_escape_sequences(capsys):
    names = "Screenshot 9.41\u202fAM 写真\u30001 a\xa0b می\u200cخواهم 👩\u200d🔬\n"
    say(names + "\x1b\x9b\u202e\udcff\r", needed=True)
    assert capsys.readouterr().out == names + r"\x1b\x9b\u202e\udcff\r" + "\n"
