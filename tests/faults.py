"""Runs of main.py in which one call of the C library goes wrong, see faults.c.

`python -m tests.faults FAULTS.SO` forks a process for each request, a line of JSON. All modules are
imported by then, which saves most of a run's time.
"""

import ctypes
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.commands import MODULES
from tests.helpers import ROOT, as_users

ACTIONS = ("fail", "full", "kill", "delay")


class Faults:
    """A process to fork runs from; a context manager."""

    def __init__(self, folder: Path):
        """Builds the library in `folder`, with the system's C compiler."""
        library, source = folder / "faults.so", ROOT / "tests/faults.c"
        command = ["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"]
        subprocess.run(command, check=True)
        environment = as_users() | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.faults", library]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, env=environment, stdin=pipe, stdout=pipe, text=True, cwd=ROOT
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        assert self._process.wait(60) == 0
        self._process.stdout.close()

    def run(self, arguments, workdir: Path, number: int = 0, action: str = "fail"):
        """main.py, in which the number-th call goes wrong below the workdir.

        Returns its exit code, or the negative number of the signal that ended it; the calls that
        were made, if it could tell; and what it printed.
        """
        log = workdir.with_suffix(".log")
        argv = ["main.py", f"--workdir={workdir}", *arguments]
        request = [argv, str(workdir), number, ACTIONS.index(action), str(log)]
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        code, calls = json.loads(self._process.stdout.readline())
        return code, calls, log.read_text()


def serve(library: str) -> None:
    from imgcls.__main__ import Train
    from imgcls.run import cli

    for module in MODULES.split():
        importlib.import_module(module)
    faults = ctypes.CDLL(library)
    for line in sys.stdin:
        argv, folder, number, action, log = json.loads(line)
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            faults.arm(os.fsencode(folder), number, action)
            try:
                sys.argv = argv  # ml_collections looks for the flags of a config there
                cli.run(lambda: Train, argv)
            except SystemExit as error:
                os.write(writer, str(faults.calls()).encode())
                os._exit(error.code or 0)
        os.close(writer)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        calls = os.read(reader, 20)
        os.close(reader)
        print(json.dumps([code, int(calls or 0)]), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
