"""Signals that stop a run, in whatever thread, terminal or shell it was started."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from imgcls.errors import Stopped
from imgcls.run import signals
from imgcls.run.signals import StopSignal, interruptibly
from tests.helpers import ROOT

# A command that says what it does until a signal comes, and leaves as train_and_evaluate does.
PROGRAM = """
import os, signal, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever these tests were started by
from types import SimpleNamespace
from imgcls.run import cli
from imgcls.run.logs import say
from imgcls.run.signals import StopSignal

def main(_):
    with StopSignal() as stop:
        say("ready")
        while not stop.requested:
            say("working")
            time.sleep(0.01)
        say("saving")
        time.sleep(pause)
        raise stop.stopped("saved")

pause = {pause}
if os.isatty(0):  # it becomes the terminal of this session
    os.close(os.open(os.ttyname(0), os.O_RDWR))
cli.run(lambda: SimpleNamespace(define_flags=lambda: None, main=main, __doc__=""), ["command"])
"""


def start(pause=0, **options):
    command = [sys.executable, "-c", PROGRAM.format(pause=pause)]
    return subprocess.Popen(command, cwd=ROOT, text=True, **options)


def poll_for_ever():
    while True:
        signals.poll()
        time.sleep(0.01)


@pytest.mark.parametrize(
    "sent, code",
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)],
)
def test_a_signal_asks_and_says_its_exit_code(sent, code):
    handler = lambda *_: None
    before = signal.signal(sent, handler)  # under nohup SIGHUP would be ignored
    with StopSignal(), pytest.raises(Stopped, match=f"stopped by {sent.name}: ") as stopped:
        signal.raise_signal(sent)
        interruptibly(poll_for_ever)
    assert stopped.value.exit_code == code
    assert signal.signal(sent, before) == handler


def test_a_pair_of_signals_is_one_and_a_later_one_ends_at_once():
    process = start(pause=60, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    process.terminate()  # as a forwarder and the kill of a group do
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(signals.PAIR_SECONDS + 0.5)
    process.terminate()
    process.stdout.close()
    assert process.wait(timeout=5) == 143


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert interruptibly(lambda: 5) == 5 and not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_closes_stops_the_run_and_nothing_else():
    ours, theirs = pty.openpty()
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = start(**streams, start_new_session=True)
    os.close(theirs)
    printed = b""
    while b"working" not in printed:
        printed += os.read(ours, 1000)
    os.close(ours)
    assert process.wait(timeout=10) == 129


def test_in_another_thread_there_are_no_handlers_and_no_signal_is_taken():
    before = {number: signal.getsignal(number) for number in signals.EXIT_CODES}

    def work():
        with StopSignal() as stop:
            assert {number: signal.getsignal(number) for number in before} == before
            return interruptibly(threading.get_ident), stop.requested

    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(work).result()[1] == 0
    assert {number: signal.getsignal(number) for number in before} == before
