"""Seconds from typing the command to the first training step, and memory from epoch to epoch.

    python benchmarks/startup.py [--config=configs/cifar10.py] [--repetitions=5] [--epochs=4]
        [--config.key=value ...]

The command is main.py's, in a cache directory of its own: once to decode the images, then with an
empty cache of compiled programs and a full one by turns. Memory is that of another run, at batch
size 500 on a tenth of the training images (all are resident), sampled twenty times a second.
"""

import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import common
import psutil


def main_py(folder: Path, *flags: str) -> subprocess.Popen:
    shutil.rmtree(folder / "run", ignore_errors=True)
    command = [sys.executable, str(common.ROOT / "main.py"), f"--workdir={folder / 'run'}", *flags]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def failed(process: subprocess.Popen, line: str) -> SystemExit:
    return SystemExit(f"main.py ended with exit code {process.returncode}: {line.strip()}")


def start(folder: Path, *flags: str) -> dict[str, float]:
    """Seconds to the start and the end of the first step, and those of them in compilation."""
    began, seconds, line = time.perf_counter(), {}, ""
    process = main_py(folder, *flags, "--config.train.log_every_steps=1")
    for line in process.stdout:
        now = time.perf_counter() - began
        if found := re.match(r"compiled in ([\d.]+) s", line):
            seconds["compilation"] = float(found[1])
        if line.startswith("training:"):
            seconds["first_step_begins"] = now
        if line.startswith("step 1 "):
            seconds["first_step_ends"] = now
            break
    process.send_signal(signal.SIGTERM)  # what is written meanwhile goes with the folder
    process.stdout.close()
    process.wait()
    if "first_step_ends" not in seconds:
        raise failed(process, line)
    seconds["begins_without_compilation"] = seconds["first_step_begins"] - seconds["compilation"]
    return seconds


def memory(folder: Path, *flags: str) -> dict[int, float]:
    """Peak resident MiB by epoch; 0 is before training, the one past the last is testing."""
    process, epoch, peaks, line = main_py(folder, *flags), [0], {}, ""

    def sample() -> None:
        while process.poll() is None:
            try:
                resident = psutil.Process(process.pid).memory_info().rss / 2**20
            except psutil.Error:
                return
            peaks[epoch[0]] = max(peaks.get(epoch[0], 0.0), resident)
            time.sleep(0.05)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    for line in process.stdout:
        if line.startswith("training:"):
            epoch[0] = 1
        elif found := re.match(r"step \d+  epoch (\d+)\.", line):
            epoch[0] = int(found[1]) + 1
    thread.join()
    if process.wait():
        raise failed(process, line)
    return peaks


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--config", default=str(common.ROOT / "configs/cifar10.py"))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    arguments, more = parser.parse_known_args()
    flags = [f"--config={arguments.config}", *more]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = start(folder, *flags)
        starts = {"cold": [], "warm": []}
        for _ in range(arguments.repetitions):
            shutil.rmtree(folder / "cache" / "imgcls" / "xla")
            for cache in starts:
                starts[cache].append(start(folder, *flags))
        settings = ("data.train=train[:10%]", "train.batch_size=500", "train.log_every_steps=5")
        settings += (f"train.epochs={arguments.epochs}", "train.small_epochs=0.0")
        peaks = memory(folder, flags[0], *(f"--config.{setting}" for setting in settings), *more)
    medians = {
        cache: {key: statistics.median(run[key] for run in runs) for key in first}
        for cache, runs in starts.items()
    }
    head = ["cache of compiled programs", *(key.replace("_", " ") + " (s)" for key in first)]
    rows = [[cache, *(f"{value:.2f}" for value in m.values())] for cache, m in medians.items()]
    print(common.table([head, *rows]))
    peaks = {f"epoch {k}": round(v) for k, v in peaks.items()}
    print(common.table([["(0: loading, last: test)", "peak resident MiB"], *peaks.items()]))
    values = {"medians": medians, "starts": starts, "undecoded": first, "peak_mib": peaks}
    common.write_result("startup", Path(arguments.config).stem, values)


if __name__ == "__main__":
    main()
