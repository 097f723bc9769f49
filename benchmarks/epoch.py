"""A whole epoch of main.py against its bare compiled step times the number of steps.

    python benchmarks/epoch.py [--config=configs/cifar10.py] [--repetitions=5] [--steps=20]

The training loop runs in a folder of its own, and validates and saves after every epoch. An epoch
is timed from one validation to the next. Between two, the same step runs alone on one batch.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import jax
from absl import flags
from ml_collections import config_flags

from imgcls.config import to_json, validate
from imgcls.errors import UserError
from imgcls.experiment import Experiment
from imgcls.run import cli, machine
from imgcls.run.logs import say
from imgcls.train import train_and_evaluate


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", str(common.ROOT / "configs/cifar10.py"))
    flags.DEFINE_integer("repetitions", 5, "Epochs measured, after one of warming up.")
    flags.DEFINE_integer("steps", 20, "Bare steps between two epochs.")


def main(_: list[str]) -> None:
    config, bare_steps = flags.FLAGS.config, flags.FLAGS.steps
    config.train.epochs = flags.FLAGS.repetitions + 1
    config.train.small_epochs = 0.0
    config.train.validate_every_epochs = config.train.checkpoint_every_epochs = 1
    validate(config)
    if not config.data.validation:
        raise UserError("config.data.validation is empty: the epochs are timed by validation")
    machine.start()
    experiment = Experiment(config, test=False)
    state, batch = experiment.compile_init()(), experiment.train_batch(0)
    step = experiment.compile_train_step(state)
    epochs, bare, began = [], [], time.perf_counter()

    def between_epochs(row: dict[str, Any]) -> None:
        nonlocal state, began
        if row["split"] == "validation":
            started = time.perf_counter()
            epochs.append(started - began)
            for _ in range(bare_steps):
                state, metrics = step(state, batch, experiment.rng)
            jax.block_until_ready(metrics)
            began = time.perf_counter()
            bare.append((began - started) / bare_steps)

    with tempfile.TemporaryDirectory() as folder:
        options = {"splits": experiment.splits, "callback": between_epochs, "test": False}
        train_and_evaluate(config, folder, **options)
    del epochs[0], bare[0]  # the first began with compiling
    ratios = [experiment.steps_per_epoch * b / e for b, e in zip(bare, epochs)]
    say(f"epoch {statistics.median(epochs):.2f} s, bare step {statistics.median(bare):.4f} s")
    steps, ratio = experiment.steps_per_epoch, statistics.median(ratios)
    say(f"bare step x {steps} steps / epoch: {ratio:.3f}")
    values = {"epoch_seconds": epochs, "bare_step_seconds": bare, "ratios": ratios}
    values |= {"steps_per_epoch": steps, "ratio": ratio}
    values |= {"dtype": experiment.model.dtype.name, "config": to_json(config)}
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    common.write_result("epoch", name, values)


if __name__ == "__main__":
    cli.run(lambda: sys.modules[__name__], sys.argv)
