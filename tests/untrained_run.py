"""Writes the workdir of a run that has not begun: its model is only initialised."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from imgcls.config import to_json
from imgcls.data.splits import Split
from imgcls.experiment import Experiment
from imgcls.run.checkpoint import Checkpoints
from imgcls.run.workdir import write_json


def write_untrained_run(workdir: Path, config: ConfigDict, class_names: tuple[str, ...]) -> None:
    examples = config.train.batch_size
    shape = (examples, *config.data.image_size, config.data.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    labels = np.arange(examples, dtype=np.int32) % len(class_names)
    train = Split("train", [images], labels, [str(i) for i in range(examples)], class_names)
    state = Experiment(config, splits={"train": train}).compile_init()()
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", to_json(config))
    meta = {"class_names": class_names, "cpu_kernels": [], "seconds": 0.0, "train_seconds": 0.0}
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(0, state, meta)
    checkpoints.close()
