"""Throughput and memory against batch size, image size, number of images, and devices.

    python benchmarks/scaling.py [--sweep batch_size image_size examples devices] [--quick]

Each point is a process of its own, so that its peak memory is its own. Writes results/scaling.json
and a plot for each sweep, results/scaling_<sweep>.png, unless --quick. Plain XLA throughout
`devices`: several simulated devices cannot have the oneDNN convolutions.
"""

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import common

# The network's widths, the points, and their axis. Narrow networks make large points affordable.
SWEEPS = {
    "batch_size": ((64, 256, 256), (8, 32, 128, 512, 2000), "batch size"),
    "image_size": (
        (16, 32, 64, 64),
        (32, 64, 96, 128, 160, 224),
        "image side (pixels)",
    ),
    "examples": ((16, 32), (1000, 10_000, 50_000, 200_000), "training images in memory"),
    "devices": ((16, 32, 64), (1, 2, 4, 8), "simulated devices on the same cores"),
}
DEFAULTS = {"batch_size": 256, "image_size": 32, "examples": 0, "devices": 1}
SECONDS = 8.0  # measured at each point, or three steps where they take longer


def measure_point(widths: tuple[int, ...], batch_size: int, **point: Any) -> dict[str, Any]:
    """In the worker: images a second, peak resident MiB, and the MiB of the training images."""
    import jax

    jax.config.update("jax_num_cpu_devices", point["devices"])
    from contenders import Imgcls, network_config

    config = network_config("airbench94", batch_size=batch_size, dtype="float32")
    config.model.update(widths=tuple(widths), whiten=False)
    config.data.image_size = (point["image_size"],) * 2
    if point["sweep"] == "devices":
        config.model.cpu_kernels = "off"
    examples = max(point["examples"], batch_size)
    ours = Imgcls(config, examples)
    ours.train(1)
    started, steps = time.perf_counter(), 0
    while steps < 3 or time.perf_counter() - started < SECONDS:
        if point["examples"]:  # from the split, in the order of the run
            ours.batch = ours.experiment.train_batch(steps)
        ours.train(1)
        steps += 1
    return {
        "images_per_second": batch_size * steps / (time.perf_counter() - started),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "data_mib": examples * point["image_size"] ** 2 * config.data.channels / 2**20,
    }


def plot(sweep: str, points: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    x = [point[sweep] for point in points]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(x, [p["images_per_second"] for p in points], "o-")
    left.set_ylabel("images/s, a training step")
    right.plot(x, [p["peak_mib"] for p in points], "o-", label="peak resident")
    right.plot(x, [p["data_mib"] for p in points], "o--", label="of that, training images")
    right.set_ylabel("MiB")
    right.legend()
    if sweep == "image_size":  # a straight line where throughput is a number of pixels
        left.set_yscale("log")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [f"{value:,}" for value in x])
        axes.minorticks_off()
        if axes.get_yscale() == "linear":
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.set_xlabel(SWEEPS[sweep][2])
        axes.grid(alpha=0.3)
    common.RESULTS.mkdir(exist_ok=True)
    figure.savefig(common.RESULTS / f"scaling_{sweep}.png", dpi=100)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--quick", action="store_true", help="two small points a sweep: a trial")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return common.serve(lambda: ({}, measure_point))
    for sweep in arguments.sweep:
        widths, values, _ = SWEEPS[sweep]
        points = []
        for value in values[:2] if arguments.quick else values:
            # Four times the pixels, a quarter of the images.
            point = DEFAULTS | {sweep: value}
            if sweep == "image_size":
                point["batch_size"] = max(8, 256 * 32**2 // value**2)
            worker = common.Worker(Path(__file__), ["--serve"])
            points.append(point | worker.ask(sweep=sweep, widths=widths, **point))
            worker.close()
            rate, peak = points[-1]["images_per_second"], points[-1]["peak_mib"]
            print(f"{sweep} {value}: {rate:.0f} images/s, peak {peak:.0f} MiB", flush=True)
        if not arguments.quick:
            plot(sweep, points)
            common.write_result("scaling", sweep, {"widths": widths, "points": points})


if __name__ == "__main__":
    main()
