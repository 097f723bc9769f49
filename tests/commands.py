"""Commands as their users type them, each in a fork of a process that has imported all they need.

That saves each the seconds of its imports. No backend was started in that process.
"""

import atexit
import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from tests.helpers import ROOT, as_users

# What commands import, some of it only when it is needed.
MODULES = """tests.commands imgcls.train imgcls.tuning.sweep imgcls.evaluation.compare
imgcls.inference.embed imgcls.inference.export imgcls.data.tfds matplotlib.backends.backend_svg
matplotlib.figure scipy.optimize sklearn.datasets sklearn.metrics sklearn.model_selection
tensorboardX"""


@functools.cache
def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES.split())
    return context


class Command:
    """main.py, or `python -m` any other name, and of `subprocess.Popen` what tests use, as text.

    What it prints on stderr is in `stdout`, too, unless `stderr` is subprocess.PIPE.
    """

    def __init__(self, *argv, cwd=ROOT, env=None, stderr=subprocess.STDOUT):
        self.stdout, out = self._pipe()
        self.stderr, errors = self._pipe() if stderr == subprocess.PIPE else (None, out)
        how = ([*map(str, argv)], cwd, env or dict(os.environ), out, errors)
        self._process = _context().Process(target=_become, args=how, daemon=True)
        self._process.start()
        self.pid = self._process.pid
        for end in {out, errors}:
            end.close()

    def _pipe(self):
        reader, writer = _context().Pipe(duplex=False)
        return open(os.dup(reader.fileno()), encoding="utf-8"), writer

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = 300) -> list[str]:
        """What is still to come of stdout and of stderr. Killed, and an error, after `timeout`."""
        streams = [stream for stream in (self.stdout, self.stderr) if stream]
        with ThreadPoolExecutor(2) as pool:
            texts = [pool.submit(stream.read) for stream in streams]
            try:
                self.wait(timeout)
            finally:
                self.kill()
                found = [text.result() for text in texts]
        for stream in streams:
            stream.close()
        return [*found, None][:2]

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_) -> None:
        self.wait()
        self.stdout.close()


def run_command(*argv, timeout: float = 300, **options) -> subprocess.CompletedProcess:
    """As `subprocess.run`, of a `Command`."""
    command = Command(*argv, stderr=subprocess.PIPE, **options)
    output, errors = command.communicate(timeout)
    return subprocess.CompletedProcess(argv, command.returncode, output, errors)


def run_fresh(*argv, **options) -> subprocess.CompletedProcess:
    """As `run_command`, in an interpreter that has imported nothing."""
    program = [str(ROOT / argv[0])] if argv[0].endswith(".py") else ["-m", argv[0]]
    command = [sys.executable, *program, *map(str, argv[1:])]
    options = {"cwd": ROOT, "timeout": 300, "env": dict(os.environ)} | options
    options["env"] = options["env"] | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, **options)


def run_main(*arguments, **options) -> subprocess.CompletedProcess:
    """As `run_command`, of main.py on one device."""
    return run_command("main.py", *arguments, **{"env": as_users()} | options)


def _become(argv, cwd, environment, *outputs) -> None:
    for stream, output in enumerate(outputs, start=1):
        os.dup2(output.fileno(), stream)
    for output in outputs:
        output.close()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv  # ml_collections looks for the flags of a config there
    try:
        if argv[0].endswith(".py"):
            runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
        else:
            runpy.run_module(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends a process without them
