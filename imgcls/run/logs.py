"""What a run says while it runs: lines or a progress bar, metrics.jsonl and TensorBoard events."""

import contextlib
import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from tqdm import tqdm

from imgcls.errors import UserError, printable, visible
from imgcls.parallel import is_main
from imgcls.run.files import append_line, write_bytes

# What each row of metrics.jsonl has beside the figures of the task.
ROW_KEYS = ("step", "epoch", "split", "learning_rate", "images_per_second", "seconds")
SPACES = "\n\t\xa0\u1680\u202f\u205f\u3000\u200c\u200d" + "".join(map(chr, range(0x2000, 0x200B)))
BAR = "{percentage:3.0f}%|{bar:8}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {desc}"


def say(text: str, *, needed: bool = False) -> None:
    """Prints lines, in process 0. Escape sequences in them are shown, not obeyed.

    A reader or terminal that left (`| head`) or a full disk ends the output, not the run; but a
    full disk is a UserError where the output is `needed`, in which names have all their spaces.
    """
    if not is_main():
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        shown = visible(text, SPACES if needed else "\n\t").encode(encoding, "backslashreplace")
        tqdm.write(shown.decode(encoding), file=sys.stdout)
        sys.stdout.flush()
    except OSError as error:
        drop(sys.stdout)
        if isinstance(error, BrokenPipeError):
            return
        why = f"the output cannot be written ({error.strerror})"
        if needed:
            raise UserError(f"{why}: send it elsewhere") from None
        complain(f"warning: {why}: nothing more is printed there")


def complain(text: str) -> None:
    """Prints lines on stderr, as `say` does."""
    with contextlib.suppress(OSError):
        tqdm.write(visible(text), file=sys.stderr)


def drop(stream: TextIO) -> None:
    """Lets a stream that cannot be written end nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def progress(total: int, doing: str, unit: str = "", initial: int = 0) -> tqdm:
    """A progress bar on a terminal, cut off on its right; elsewhere one line, with a `unit`."""
    doing = printable(doing)
    if unit and not sys.stderr.isatty():
        say(f"{doing}: {total} {unit}")
    options: dict[str, Any] = {"dynamic_ncols": True, "disable": None if is_main() else True}
    bar = tqdm(total=total, desc=doing, initial=initial, bar_format=BAR, **options)
    if not bar.disable:  # tqdm before 4.70 fills the last column, where some wrap
        shape = bar.dynamic_ncols
        bar.dynamic_ncols = lambda file: ((shape(file)[0] or 1) - 1, None)
    return bar


class MetricWindow:
    """Sums of training metrics since the last log line, on the device until logged or saved.

    Sums are float64 and added step by step, so that an interrupted window, saved and continued, has
    the same bits.
    """

    def __init__(self, sums: dict[str, float] | None = None, bad_steps: list[int] | None = None):
        self.sums = dict(sums or {})
        self.bad_steps = list(bad_steps or [])  # steps whose loss or gradient was not finite
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self._pending.append((step, metrics))

    def wait(self, *, ahead: int) -> None:
        """Blocks until at most `ahead` steps are under way: enough to keep the device busy, few
        enough that memory, the progress bar and a stop signal stay close to the present."""
        if len(self._pending) > ahead:
            jax.block_until_ready(self._pending[-ahead - 1][1])

    def fetch(self) -> dict[str, float]:
        """The sums, every step of them."""
        pending, self._pending = self._pending, []
        for step, metrics in jax.device_get(pending):
            if metrics.pop("bad"):
                self.bad_steps.append(step)
            add_sums(self.sums, metrics)
        return self.sums


def add_sums(sums: dict[str, float], metrics: dict[str, Any]) -> None:
    for key, value in metrics.items():
        sums[key] = sums.get(key, 0.0) + float(value)


def mean_metrics(sums: dict[str, float]) -> dict[str, float]:
    """The means of all sums but "count", which divides them; NaN where nothing was counted."""
    count = sums["count"] or math.nan
    return {key: value / count for key, value in sums.items() if key != "count"}


def figures_of(row: dict[str, Any]) -> list[str]:
    """The names of a row's means: what the task counts."""
    return [key for key in row if key not in ROW_KEYS]


class Clock:
    """Seconds of the whole run and of its training; steps and seconds since the last log line."""

    def __init__(self, seconds: float, train_seconds: float):
        self._before, self._started = seconds, time.perf_counter()
        self.train_seconds, self._mark = train_seconds, self._started
        self.steps, self._since = 0, 0.0

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._started

    def lap(self) -> None:
        """Counts the time since the last lap or pause as training."""
        self.train_seconds += (spent := self.pause())
        self._since += spent

    def pause(self) -> float:
        """Returns the time since the last lap or pause, which was not training."""
        now = time.perf_counter()
        spent, self._mark = now - self._mark, now
        return spent

    def steps_per_second(self) -> float:
        """Of the training since the last call."""
        self.lap()
        rate = self.steps / self._since
        self.steps, self._since = 0, 0.0
        return rate


class MetricWriter:
    """Appends to metrics.jsonl and to a TensorBoard event file, from the restored step on.

    Validation rows are kept up to `validated_step`: the restored step may not have been validated
    when it was saved. In any process but the first it writes nothing. Events are written in the
    caller's thread: tensorboardX's own would block the run for ever when the disk is full.
    """

    def __init__(self, workdir: Path, *, start_step: int, validated_step: int):
        self._writes = is_main()
        if not self._writes:
            return
        # Loading it takes a quarter of a second, which commands that do not train need not spend.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._path, last = workdir / "metrics.jsonl", {"validation": validated_step}
        rows = read_metrics(self._path)
        kept = [row for row in rows if row["step"] <= last.get(row["split"], start_step)]
        write_bytes(self._path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._summary, self._event = summary, Event
        prefix, suffix = str(workdir / "events"), f".{secrets.token_hex(8)}"  # no link has the name
        self._events = EventsWriter(prefix, suffix)
        # TensorBoard forgets what earlier files say of this step and later.
        self._add(start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, row: dict[str, Any]) -> None:
        """Writes one line; NaN and infinity, which JSON lacks, become null."""
        if not self._writes:
            return
        finite = lambda value: not isinstance(value, float) or math.isfinite(value)
        append_line(self._path, json.dumps({k: v if finite(v) else None for k, v in row.items()}))
        for key, value in row.items():
            if isinstance(value, float):
                scalar = self._summary.scalar(f"{row['split']}/{key}", value)
                self._add(row["step"], summary=scalar)

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """image: uint8[H, W, 3]."""
        self._add(step, summary=self._summary.image(tag, image, dataformats="HWC"))

    def close(self) -> None:
        if self._writes:
            self._events.close()

    def _add(self, step: int, **content: Any) -> None:
        self._events.write_event(self._event(wall_time=time.time(), step=step, **content))
        self._events.flush()


def image_grid(images: np.ndarray, columns: int = 8) -> np.ndarray:
    """uint8[N, H, W, C] -> uint8[rows * H, columns * W, 3], whole rows only."""
    n, h, w, c = images.shape
    columns, rows = min(columns, n), max(n // columns, 1)
    grid = images[: rows * columns].reshape(rows, columns, h, w, c).swapaxes(1, 2)
    return np.broadcast_to(grid.reshape(rows * h, columns * w, c), (rows * h, columns * w, 3))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl."""
    return [row for row in read_lines(path, _is_row) if row]


def read_lines(path: Path, accepts: Callable[[dict[str, Any]], Any] = bool) -> list[dict[str, Any]]:
    """A JSON object per line; {} for one that is none, or not accepted. No file has no lines."""
    objects: list[dict[str, Any]] = []
    for line in filter(bytes.strip, path.read_bytes().split(b"\n") if path.exists() else ()):
        value = None
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
        objects.append(value if isinstance(value, dict) and accepts(value) else {})
    if not all(objects[:-1]):  # the last may have been torn by a kill
        logging.warning("lines of %s are broken, and left out", path)
    return objects


def _is_row(row: dict[str, Any]) -> bool:
    number = lambda value, limit=1e39: type(value) in (int, float) and abs(value) < limit
    right_type = isinstance(row.get("split"), str) and type(row.get("step")) is int
    others = [value for key, value in row.items() if key != "split" and value is not None]
    return right_type and number(row.get("epoch"), 1e15) and all(map(number, others))
