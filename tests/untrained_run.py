"""Writes the workdir of a run that has not begun: its model is only initialised."""

from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from imgcls import experiment
from imgcls.run.checkpoint import Checkpoints
from imgcls.run.workdir import write_json
from imgcls.state import create_state


def write_untrained_run(workdir: Path, config: ConfigDict, class_names: tuple[str, ...]) -> None:
    model = experiment.build_model(config, len(class_names))
    images = np.random.default_rng(0).normal(
        size=(4, *config.data.image_size, config.data.channels)
    )
    state = create_state(
        jax.random.key(config.seed),
        images.astype(np.float32),
        model=model,
        tx=experiment.build_optimizer(config, lambda step: 0.1),
        ema=config.optim.ema_decay > 0,
    )
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", experiment.to_json(config))
    meta = {"class_names": class_names, "cpu_kernels": [], "seconds": 0.0, "train_seconds": 0.0}
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(0, state, meta)
    checkpoints.close()
