"""A whole epoch of main.py against its bare compiled step times the number of steps.

    python benchmarks/epoch.py [--config=configs/cifar10.py] [--repetitions=5] [--steps=20]

One run of the training loop, in its own workdir, validating and saving after every epoch. Between
two epochs the same compiled step runs alone on one batch, so that the two alternate.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import common
import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags

from imgcls import experiment
from imgcls.run import cli, machine
from imgcls.run.checkpoint import Checkpoints
from imgcls.run.logs import say
from imgcls.run.signals import StopSignal
from imgcls.train import _Run

CONFIG = config_flags.DEFINE_config_file("config", str(common.ROOT / "configs/cifar10.py"))
REPETITIONS = flags.DEFINE_integer("repetitions", 5, "Epochs measured, after one of warming up.")
STEPS = flags.DEFINE_integer("steps", 20, "Bare steps between two epochs.")


class Run(_Run):
    """The training loop with a clock at the end of each epoch."""

    def _between_steps(self) -> None:
        super()._between_steps()
        if self.step % self.steps_per_epoch:
            return
        if self.step == 0:
            self.epochs, self.bare = [], []
        else:
            self.checkpoints.wait()  # the epoch pays for all of its save
            jax.block_until_ready(self.state)
            self.epochs.append(time.perf_counter() - self.epoch_started)
            self.bare.append(self.bare_step())
        self.clock = self.epoch_started = time.perf_counter()

    def bare_step(self) -> float:
        """Seconds, the mean of some steps."""
        state, batch = jax.tree.map(jnp.copy, self.state), self._train_batch()
        jax.block_until_ready((state, batch))
        started = time.perf_counter()
        for _ in range(STEPS.value):
            state, _metrics = self.train_steps[False](state, batch, self.rng)
        jax.block_until_ready(state)
        return (time.perf_counter() - started) / STEPS.value


def main(_: list[str]) -> None:
    config = CONFIG.value
    config.train.epochs = REPETITIONS.value + 1
    config.train.early_epochs = 0.0
    config.train.validate_every_epochs = config.train.checkpoint_every_epochs = 1
    experiment.validate(config)
    machine.start()
    with tempfile.TemporaryDirectory() as folder, StopSignal() as stop:
        run = Run(config, Path(folder), Checkpoints(Path(folder) / "checkpoints"), stop)
        run.train()
        run.checkpoints.close()
    epochs, bare = run.epochs[1:], run.bare[1:]
    ratios = [run.steps_per_epoch * b / e for b, e in zip(bare, epochs)]
    say(f"epoch {statistics.median(epochs):.2f} s, bare step {statistics.median(bare):.4f} s")
    say(f"bare step x {run.steps_per_epoch} steps / epoch: {statistics.median(ratios):.3f}")
    values = {"epoch_seconds": epochs, "bare_step_seconds": bare, "ratios": ratios}
    values |= {"steps_per_epoch": run.steps_per_epoch, "ratio": statistics.median(ratios)}
    values |= {"dtype": run.model.dtype.name, "config": experiment.to_json(config)}
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    common.write_result("epoch", name, values)


def define_flags() -> None:
    pass


if __name__ == "__main__":
    cli.run(lambda: sys.modules[__name__], sys.argv)
