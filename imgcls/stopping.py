"""SIGTERM and Ctrl-C: the first asks the run to save and leave, the second leaves at once."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from imgcls.errors import Stopped

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


class StopSignal:
    """Installed as a context manager around a run, in the main thread.

    Until `defer` is called there is nothing to save, and the first signal raises `Stopped` wherever
    the main thread is. Afterwards it sets `requested`, and the loop saves before it leaves.
    """

    def __init__(self):
        self.requested: int | None = None
        self._deferred = False

    def __enter__(self) -> "StopSignal":
        self._before = {s: signal.signal(s, self._handle) for s in EXIT_CODES}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        self._deferred = True

    def _handle(self, number: int, _frame) -> None:
        if self.requested is not None:
            os._exit(EXIT_CODES[number])
        self.requested = number
        if not self._deferred:
            raise self.stopped("nothing to save yet")

    def stopped(self, text: str) -> Stopped:
        error = Stopped(f"stopped by {signal.Signals(self.requested).name}: {text}")
        error.exit_code = EXIT_CODES[self.requested]
        return error


def interruptibly(function: Callable[[], Any]) -> Any:
    """function(), in a thread: signals reach the main thread meanwhile.

    For compilations, which may hold the main thread for minutes. A thread left behind by a signal
    dies with the process.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = function()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]
