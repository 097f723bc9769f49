"""TensorBoard event files, written in the caller's thread: tensorboardX's own writer, in a thread
beside it, would on a full disk print a traceback and then block the run for ever."""

import time
from pathlib import Path
from typing import Any

import numpy as np

FLUSH_SECONDS = 10


class EventWriter:
    """Appends to a new event file in `directory`. Errors of the disk are OSError.

    TensorBoard forgets what earlier files say of `start_step` and later.
    """

    def __init__(self, directory: Path, *, start_step: int):
        # Loading it takes a quarter of a second, which commands that do not train need not spend.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._summary, self._event = summary, Event
        self._writer = EventsWriter(str(directory / "events"))
        self._flushed = time.monotonic()
        self._write(start_step, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, tag: str, value: float, step: int) -> None:
        self._write(step, summary=self._summary.scalar(tag, value))

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """image: uint8[H, W, 3]."""
        self._write(step, summary=self._summary.image(tag, image, dataformats="HWC"))

    def close(self) -> None:
        self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **content))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()
