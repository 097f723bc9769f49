"""Trains a config with several seeds: accuracy as mean and confidence interval, and time.

    python benchmarks/time_to_accuracy.py --config=configs/cifar10.py [--seeds=3] [--workdir=runs]
        [--output=benchmarks/results/cifar10.json] [--note=TEXT] [--config.key=value ...]
    python benchmarks/time_to_accuracy.py --config=configs/cifar10.py --collect runs/a runs/b ...

The first form is a sweep without a space, which needs validation images; its time, imports and all,
is divided by its seeds. The second form summarises runs that are finished. README.md's table is
made of the output files: run `python benchmarks/tables.py` afterwards.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common

from imgcls.errors import UserError
from imgcls.evaluation.groups import student_interval
from imgcls.run import machine
from imgcls.run.workdir import read_json, write_json

COMMAND = "command.json"  # in a workdir: what only the one who typed the command knows


def train(config: str, sweep: Path, seeds: int, *flags: str) -> list[Path]:
    """Trains and tests the seeds, one after the other on all cores, and returns their workdirs.

    The sweep's seconds, in equal parts, go to the workdirs, if they are all of them.
    """
    fresh = not (sweep / "sweep.json").exists()
    command = [sys.executable, "-m", "imgcls", "sweep", f"--config={config}", f"--workdir={sweep}"]
    command += [f"--seeds={seeds}", f"--cores={len(machine.cores())}", "--test", *flags]
    environment = os.environ | {"PYTHONPATH": str(common.ROOT)}
    started = time.perf_counter()
    code = subprocess.run(command, env=environment).returncode
    if code:
        raise SystemExit(code)
    seconds = round((time.perf_counter() - started) / seeds, 1)
    workdirs = sorted(sweep.glob("seeds/*"), key=lambda path: int(path.name.partition("-")[2]))
    for workdir in workdirs if fresh else []:
        write_json(workdir / COMMAND, {"seconds": seconds, "machine": common.machine()})
    return workdirs


def collect(workdirs: list[Path]) -> dict[str, Any]:
    """Summarises finished runs of one config, one commit and one kind of machine.

    Returns:
        config (the common one), seeds (a dict for each run), top1 (mean, 95% interval, and what it
        is over: seeds or, of a single run, examples; None for two seeds), seconds (means of the
        whole `command` and of what the run counts itself), machine, device, versions, git_commit.

    Raises:
        UserError: a run is not finished, differs in more than its seed, or repeats one.
    """
    runs = [_read(workdir) for workdir in workdirs]
    first = runs[0]
    for workdir, run in zip(workdirs, runs):
        for key in ("config", "git_commit", "versions", "device", "machine"):
            if run[key] != first[key]:
                raise UserError(f"{workdir} has another {key} than {workdirs[0]}: {run[key]}")
    rows = [run["row"] for run in runs]
    seeds = [row["seed"] for row in rows]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"the seeds of these runs are {seeds}: each may come only once")
    top1 = [row["top1"] for row in rows]
    several = len(rows) > 1
    commands = [row["command_seconds"] for row in rows]
    return {
        "config": first["config"],
        "top1": {
            "mean": statistics.fmean(top1),
            "interval": student_interval(top1) if several else rows[0]["top1_interval"],
            "over": f"{len(rows)} seeds" if several else "examples, one seed",
        },
        "seconds": {
            "command": None if None in commands else statistics.fmean(commands),
            "inside": statistics.fmean(row["seconds"] for row in rows),
        },
        "images_per_second": statistics.fmean(row["images_per_second"] for row in rows),
        "seeds": rows,
        **{key: first[key] for key in ("machine", "device", "versions", "git_commit")},
    }


def _read(workdir: Path) -> dict[str, Any]:
    config, results = read_json(workdir / "config.json"), read_json(workdir / "results.json")
    command = read_json(workdir / COMMAND) if (workdir / COMMAND).exists() else {}
    row = {"seed": config.pop("seed"), "command_seconds": command.get("seconds")}
    keys = ("top1", "top1_interval", "examples", "loss", "seconds", "images_per_second")
    row |= {key: results[key] for key in (*keys, "test_time_augmentation") if key in results}
    config["data"].pop("dir", None)  # where this machine keeps the data
    shared = {key: results[key] for key in ("device", "versions", "git_commit")}
    return {"config": config, "row": row, "machine": command.get("machine"), **shared}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--config", required=True, help="such as configs/cifar10.py")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workdir", type=Path, default=Path("runs"), help="of the sweep's workdir")
    parser.add_argument("--output", type=Path, help="default: results/<config>.json")
    parser.add_argument("--note", default="", help="beside the config's name in the README")
    parser.add_argument("--machine", help="of collected runs that do not tell it")
    parser.add_argument("--collect", type=Path, nargs="+", metavar="DIR")
    arguments, flags = parser.parse_known_args()
    if arguments.collect and flags:
        parser.error(f"{' '.join(flags)}: runs that are finished take no more flags")
    if arguments.seeds < 1:
        parser.error("--seeds: at least 1")
    name = Path(arguments.config).stem
    workdirs = arguments.collect or train(
        arguments.config, arguments.workdir / f"{name}-seeds", arguments.seeds, *flags
    )
    try:
        summary = collect(workdirs)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    summary["machine"] = summary["machine"] or arguments.machine or summary["device"]
    summary |= {"name": name, "note": arguments.note}
    output = arguments.output or common.RESULTS / f"{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, summary)
    interval = " to ".join(f"{bound:.4f}" for bound in summary["top1"]["interval"] or ())
    print(f"top1 {summary['top1']['mean']:.4f} ({interval or 'no interval'}), {output}")


if __name__ == "__main__":
    main()
