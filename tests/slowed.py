"""main.py, but slow where a test sends its signal: `python -m tests.slowed WHERE FLAGS...`."""

import runpy
import sys
import time

from imgcls import train
from imgcls.errors import Stopped
from imgcls.inference.classifier import Classifier
from imgcls.run import signals
from imgcls.run.checkpoint import Checkpoints


def slow_down(owner, name: str, seconds: float, when=lambda: True) -> None:
    function = getattr(owner, name)

    def slowly(*args, **options):
        if when():
            print(f"now: {where}", flush=True)
            time.sleep(seconds)
        return function(*args, **options)

    setattr(owner, name, slowly)


def signalled() -> bool:
    try:
        return bool(signals.poll())
    except Stopped:
        return True


where = sys.argv.pop(1)
if where == "validation":
    slow_down(train, "validate", 2)
elif where == "save":
    slow_down(Checkpoints, "save", 2)
elif where == "evaluation":
    slow_down(Classifier, "logits", 2)
elif where == "a disk that hangs":
    slow_down(Checkpoints, "wait", 600, signalled)
runpy.run_path("main.py", run_name="__main__")
