"""What augmentation costs: the training step with it, against the step without, taking turns.

python benchmarks/augmentation.py [--network cifar10] [--batch_size 0] [--repetitions 15]
    [--steps 1]
"""

import statistics
import time

import common
from contenders import NETWORKS, Imgcls, network_config

VARIANTS = {
    "none": {},
    "flip, translate, cutout": {
        "flip_probability": 0.5,
        "translate_pixels": 2,
        "cutout_pixels": 8,
    },
    "rotate, zoom": {"rotate_degrees": 10.0, "zoom_fraction": 0.1},
}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--network", choices=NETWORKS, default="cifar10")
    parser.add_argument("--batch_size", type=int, default=0, help="0: that of the config")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--steps", type=int, default=1)
    arguments = parser.parse_args()
    steps, seconds = {}, {name: [] for name in VARIANTS}
    for name, strengths in VARIANTS.items():
        config = network_config(arguments.network, batch_size=arguments.batch_size)
        config.augment.update(strengths)
        steps[name] = Imgcls(config)
        steps[name].train(1)
    for _ in range(arguments.repetitions):
        for name, step in steps.items():
            started = time.perf_counter()
            step.train(arguments.steps)
            seconds[name].append((time.perf_counter() - started) / arguments.steps)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    costs = {  # over the turns: a machine's speed drifts, but less within a turn
        name: statistics.median(b / a for a, b in zip(seconds["none"], values)) - 1
        for name, values in seconds.items()
    }
    rows = [[name, f"{medians[name]:.4f}", f"{costs[name]:+.1%}"] for name in VARIANTS]
    print(common.table([["augmentation", "seconds a step", "cost"], *rows]))
    values = {"seconds": seconds, "costs": costs, "variants": VARIANTS, "steps": arguments.steps}
    values |= {"batch_size": config.train.batch_size}
    values |= {"dtype": steps["none"].experiment.model.dtype.name}
    common.write_result("augmentation", arguments.network, values)


if __name__ == "__main__":
    main()
