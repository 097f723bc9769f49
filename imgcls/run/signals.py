"""Signals that stop a run: the first asks it to save and leave, a later one leaves at once."""

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from imgcls.errors import Stopped

# A terminal or connection that closes sends SIGHUP, and Slurm SIGUSR1 before a time limit.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
EXIT_CODES: dict[int, int] = {number: 128 + number for number in STOPPING}
PAIR_SECONDS = 2  # forwarders and group kills send a signal twice, which counts as one

_futures: list[Future] = []  # of the threads of `in_thread` that are at work
_active: "StopSignal | None" = None  # signals are the process's, so there is one


class StopSignal:
    """Installed as a context manager around a run. Does nothing outside the main thread, because
    Python has handlers in that one alone.

    A signal sets `requested` and nothing else: the loop looks at it, saves, and leaves. Raised by a
    handler, it would be lost where Python discards it: inside a finaliser.
    """

    def __init__(self):
        self.requested = 0  # the signal, once there was one

    def __enter__(self) -> "StopSignal":
        global _active
        self._before: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        _active = self
        for number in EXIT_CODES:
            before = signal.getsignal(number)
            if number != signal.SIGHUP or before != signal.SIG_IGN:  # nohup ignores it
                self._before[number] = before
                signal.signal(number, lambda *_: None)
        # Python calls handlers between two bytecodes of the main thread, which may be long in
        # compiled code; the number of each signal arrives in this pipe at once.
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        global _active
        if not self._before:
            return
        _active = None
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None is another language's
        os.close(self._writer)  # ends the thread

    def _watch(self, reader: int) -> None:
        first = None
        while numbers := os.read(reader, 1):
            if numbers[0] in EXIT_CODES:
                first = first or time.monotonic()
                if time.monotonic() - first > PAIR_SECONDS:
                    os._exit(EXIT_CODES[numbers[0]])
                self.requested = self.requested or numbers[0]
        os.close(reader)

    def stopped(self, text: str) -> Stopped:
        error = Stopped(f"stopped by {signal.Signals(self.requested).name}: {text}")
        error.exit_code = EXIT_CODES[self.requested]
        return error


def poll() -> None:
    """Raises Stopped where a signal came before there was anything to save. From any thread."""
    if _active is not None and _active.requested:
        raise _active.stopped("nothing to save yet")


def left_behind() -> bool:
    """Whether a thread of `in_thread` is still at work, and may be for ever."""
    return not all(future.done() for future in _futures)


def in_thread(function: Callable[[], Any]) -> Future:
    """Starts function() in a thread that dies with the process."""
    future: Future = Future()
    _futures[:] = [other for other in _futures if not other.done()] + [future]

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def interruptibly(function: Callable[[], Any]) -> Any:
    """function(), in a thread, left within two seconds of a signal: for long work of the start.

    It may `poll` itself, to clean up; a thread that is left behind dies with the process.
    """
    future = in_thread(function)
    try:
        while not wait([future], 0.1).done:
            poll()
        poll()
    except Stopped:
        wait([future], 2)
        raise
    return future.result()
