"""Images per second of a training step (or of evaluation), here and in the alternatives.

    python benchmarks/train_step.py [--network cifar10 ...] [--batch_size 512] [--repetitions 5]
        [--steps 3] [--contenders imgcls-float32 torch-eager-float32 ...] [--measure evaluate]
        [--baseline CHECKOUT]

Each contender compiles and warms up in a process of its own. Then they take turns, so that what
else the machine does falls on all of them alike. Figures are medians over the turns. With
--baseline the only alternative is the step of another checkout, such as one of an older commit.
"""

import argparse
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import common
from contenders import BUILDERS, NETWORKS, network_config

from imgcls.experiment import compute_dtype

PROGRAM = Path("benchmarks/train_step.py")  # in a checkout
CONTENDERS = (
    *("imgcls-float32", "imgcls-bfloat16", "flax-float32", "keras-float32", "keras-bfloat16"),
    *("torch-eager-float32", "torch-eager-bfloat16", "torch-eager-autocast"),
    *("torch-compile-float32", "torch-compile-bfloat16", "torch-compile-autocast"),
)
EVALUATED = ("imgcls-float32", "imgcls-bfloat16", "torch-eager-float32", "torch-compile-float32")
# The question, who is asked, and the beginnings and dtypes of the rivals of which the best counts.
QUESTIONS = (
    ("float32, against PyTorch float32", "imgcls-float32", "torch", ("float32",)),
    ("bfloat16, against PyTorch bfloat16", "imgcls-bfloat16", "torch", ("bfloat16", "autocast")),
    ("float32, against plain Flax", "imgcls-float32", "flax", ("float32",)),
    ("float32, against Keras on JAX", "imgcls-float32", "keras", ("float32",)),
    ("float32, against the baseline", "imgcls-float32", "baseline", ("float32",)),
    ("bfloat16, against the baseline", "imgcls-bfloat16", "baseline", ("bfloat16",)),
)


def work(arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """The contender, compiled and warm: its parameters, and what runs it and gives the seconds."""
    kind, dtype = arguments.serve.rsplit("-", 1)
    config = network_config(arguments.network[0], batch_size=arguments.batch_size, dtype=dtype)
    if kind == "imgcls" and compute_dtype(config) != dtype:  # main.py falls back, a figure must not
        raise NotImplementedError(f"{dtype} is not fast on this CPU")
    contender = BUILDERS[kind](config)

    def run(count: int) -> dict[str, float]:
        started = time.perf_counter()
        getattr(contender, arguments.measure)(count)
        return {"seconds": time.perf_counter() - started}

    run(arguments.steps)
    return {"parameters": contender.parameters}, run


def measure(network: str, arguments: argparse.Namespace) -> dict[str, Any]:
    batch_size = network_config(network, batch_size=arguments.batch_size).train.batch_size
    images = arguments.steps * (batch_size if arguments.measure == "train" else 1)
    print(f"\n{network}, batch size {batch_size}")
    given = [f"--network={network}", f"--batch_size={batch_size}", f"--steps={arguments.steps}"]
    given.append(f"--measure={arguments.measure}")
    workers, absent = {}, {}
    for name in arguments.contenders:
        other = name.startswith("baseline")  # served by that checkout's own program
        script = arguments.baseline / PROGRAM if other else Path(__file__)
        serve = f"--serve={name.replace('baseline', 'imgcls')}"
        worker = common.Worker(script, [serve, *given])
        if "error" in worker.hello:
            absent[name] = worker.hello["error"]
            print(f"{name}: {absent[name]}", flush=True)
        else:
            workers[name] = worker
            print(f"{name}: {worker.hello['parameters']:,} parameters, ready", flush=True)
    parameters = {worker.hello["parameters"] for worker in workers.values()}
    if not workers:
        raise SystemExit("error: --contenders: none of them runs here, nothing is written")
    assert len(parameters) == 1, "the contenders do not compute the same network"
    seconds, idle = common.take_turns(workers, arguments.repetitions, count=arguments.steps)
    rates = {name: images / statistics.median(s) for name, s in seconds.items()}
    ratios = ratios_of(rates)
    print_tables(rates, seconds, ratios, images)
    print(f"waiting contenders used at most {idle:.1%} of a core")
    return {
        "batch_size": batch_size,
        "steps": arguments.steps,
        "parameters": parameters.pop(),
        "images_per_second": rates,
        "ratios": ratios,
        "seconds": seconds,
        "absent": absent,
        "waiting_cpu_share": idle,
    }


def ratios_of(rates: dict[str, float]) -> dict[str, float]:
    """The answers to QUESTIONS that rates by contender give."""
    ratios = {}
    for question, ours, kind, dtypes in QUESTIONS:
        rivals = [r for n, r in rates.items() if n.startswith(kind) and n.endswith(dtypes)]
        if ours in rates and rivals:
            ratios[question] = rates[ours] / max(rivals)
    return ratios


def print_tables(rates: dict, seconds: dict, ratios: dict, images: int) -> None:
    rows = [["contender", "images/s", "slowest to fastest", *[n for n in rates if "imgcls" in n]]]
    for name, rate in rates.items():
        against = [f"{rates[head] / rate:.2f}" for head in rows[0][3:]]
        spread = f"{images / max(seconds[name]):.0f} to {images / min(seconds[name]):.0f}"
        rows.append([name, f"{rate:.0f}", spread, *against])
    rows[0][3:] = [f"{name} / it" for name in rows[0][3:]]
    answers = [[question, f"{ratio:.3f}"] for question, ratio in ratios.items()]
    print(common.table(rows), common.table([["ratio", ""], *answers]), sep="\n\n", flush=True)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--batch_size", type=int, default=0, help="0: that of the config")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0, help="in a turn; images for evaluate")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=None)
    parser.add_argument("--measure", choices=("train", "evaluate"), default="train")
    parser.add_argument("--baseline", type=Path, help="root of another checkout")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    training = arguments.measure == "train"
    arguments.steps = arguments.steps or (3 if training else 10_000)
    arguments.contenders = arguments.contenders or (CONTENDERS if training else EVALUATED)
    if arguments.serve:
        return common.serve(lambda: work(arguments))
    file, more = "train_step" if training else "evaluation", {}
    if arguments.baseline:
        if not (arguments.baseline / PROGRAM).exists():
            parser.error(f"--baseline={arguments.baseline} has no {PROGRAM}")
        dtypes = [n.rsplit("-", 1)[1] for n in arguments.contenders if n.startswith("imgcls")]
        arguments.contenders = [f"{k}-{dtype}" for dtype in dtypes for k in ("imgcls", "baseline")]
        file += "_baseline"
        git = ["git", "-C", str(arguments.baseline), "rev-parse", "HEAD"]
        more["baseline"] = subprocess.check_output(git, text=True).strip()
    for network in arguments.network:
        common.write_result(file, network, measure(network, arguments) | more)


if __name__ == "__main__":
    main()
