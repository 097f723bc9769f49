"""What the benchmark programs share: workers, alternation, tables, and files of results."""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
RESULTS = Path(os.environ.get("IMGCLS_RESULTS", ROOT / "benchmarks" / "results"))
sys.path.insert(0, str(ROOT))  # a program in a folder does not see what is beside the folder


def machine() -> str:
    """Such as "2 cores of Intel(R) Xeon(R) Processor (AMX, AVX-512 bfloat16), 15 GiB"."""
    memory = psutil.virtual_memory().total / 2**30
    cpu = _cpu_facts().get("model name", "an unknown CPU")
    return f"{psutil.cpu_count()} cores of {cpu} ({instructions()}), {memory:.0f} GiB"


def instructions() -> str:
    """The two latest sets that decide speed, such as "AMX, AVX-512 bfloat16"."""
    known = {
        "amx_bf16": "AMX",
        "avx512_bf16": "AVX-512 bfloat16",
        "avx512f": "AVX-512",
        "avx2": "AVX2",
    }
    flags = _cpu_facts().get("flags", "").split()
    return ", ".join([name for flag, name in known.items() if flag in flags][:2])


def _cpu_facts() -> dict[str, str]:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return dict(re.findall(r"^(.*?)\s*: (.*)$", text, re.MULTILINE))


def write_result(name: str, part: str, values: dict[str, Any]) -> None:
    """Puts the values, with machine, versions and commit, into results/<name>.json, under `part`
    and the CPU's instructions: another CPU's figures stay."""
    from imgcls.run.machine import describe
    from imgcls.run.workdir import read_json, write_json

    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    before = read_json(path) if path.exists() else {}
    part = f"{part}, {instructions()}"
    write_json(path, before | {part: {**values, "machine": machine(), **describe()}})
    print(f"written: {path}, {part}", flush=True)


def parser(usage: str) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=usage, formatter_class=formatter, allow_abbrev=False)


def table(rows: list[list[Any]]) -> str:
    """Rows of cells, the first of them the head, as a Markdown table."""
    head, *rest = [[str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rest])


class Worker:
    """A process that answers one line of JSON with another, asleep in between.

    Its own end is `serve`. Each framework lives in one of its own: thread pools of two disturb each
    other, and peak memory is that of one thing.
    """

    def __init__(self, script: Path, arguments: list[str]):
        self._process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.hello = self._read()

    def ask(self, **request: Any) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def cpu_seconds(self) -> float:
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def close(self) -> None:
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": f"exit code {self._process.wait()}"}


def take_turns(
    workers: dict[str, Worker], repetitions: int, **request: Any
) -> tuple[dict[str, list[float]], float]:
    """The seconds of each worker's turns, and the share of a core that the waiting ones used."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    idle = 0.0
    for _ in range(repetitions):
        for name, worker in workers.items():
            others = [other for other in workers.values() if other is not worker]
            before = sum(other.cpu_seconds() for other in others)
            seconds[name].append(worker.ask(**request)["seconds"])
            used = sum(other.cpu_seconds() for other in others) - before
            idle = max(idle, used / seconds[name][-1])
    for worker in workers.values():
        worker.close()
    return seconds, idle


def serve(start: Callable[[], tuple[dict[str, Any], Callable[..., dict[str, Any]]]]) -> None:
    """The worker's end: `start` returns its first answer, and what answers each request."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints must not answer
    try:
        hello, answer = start()
        answers.write(json.dumps(hello) + "\n")
        answers.flush()
        for line in sys.stdin:
            answers.write(json.dumps(answer(**json.loads(line))) + "\n")
            answers.flush()
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name in ("torch", "keras")
        reason = "not installed" if missing else f"{type(error).__name__}: {error}"
        answers.write(json.dumps({"error": reason.splitlines()[0][:300]}) + "\n")
