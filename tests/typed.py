"""Runs command lines of its input, each in a fork of this process, which has imported everything.

Prints a list of [exit code, what was printed].
"""

import json
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from imgcls import train  # noqa: F401
from imgcls.evaluation import evaluate  # noqa: F401
from imgcls.inference import export, predict  # noqa: F401
from imgcls.tuning import sweep  # noqa: F401


def run(typed: str, output: int) -> int:
    """The exit code of a command, which prints to a file."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    signal.alarm(40)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.argv = typed.split(" ")
    code = 1
    try:
        if sys.argv[0] == "imgcls":
            runpy.run_module("imgcls", run_name="__main__")
        else:
            runpy.run_path("main.py", run_name="__main__")
    except SystemExit as left:
        code = left.code
    finally:
        os._exit(code)


if __name__ == "__main__":
    answers = []
    for typed in sys.stdin.read().splitlines():
        with tempfile.TemporaryFile("w+") as output:
            code = run(typed, output.fileno())
            output.seek(0)
            answers.append([code, output.read()])
    print(json.dumps(answers))
