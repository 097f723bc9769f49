"""A trained model ready for use: `load("runs/cifar10")(images)` gives probabilities."""

import contextlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image
from tqdm import tqdm

from imgcls.data.images import as_array, fit_image
from imgcls.data.order import eval_order
from imgcls.data.splits import Split
from imgcls.experiment import Experiment, load_config
from imgcls.parallel import put_batch
from imgcls.probe import features_step
from imgcls.run import machine
from imgcls.run.checkpoint import Checkpoints
from imgcls.run.logs import progress
from imgcls.state import TrainState


class Classifier:
    """A model with its parameters and its preprocessing, from what its run saved.

    Attributes: `experiment`, its `config` and `class_names`; `state`, whose step tells which
    checkpoint it is; `meta`, which was saved with it; and `temperature`, by which logits are
    divided before they become probabilities.
    """

    def __init__(self, experiment: Experiment, state: TrainState, meta: dict[str, Any]):
        self.experiment, self.state, self.meta = experiment, state, meta
        self.temperature = 1.0
        self.config, self.class_names = experiment.config, experiment.class_names
        self._predict = experiment.jit_predict_step()
        self._features = experiment.jit_predict_step(features_step)

    def __call__(self, images: Any, *, features: bool = False) -> np.ndarray:
        """Probabilities float32[N, K] of one image (N is 1) or several, as decoded in training.

        An image is a path, a PIL image, or an array [h, w], [h, w, 1], [h, w, 3] or, with alpha,
        [h, w, 4] of uint8 or of floats in [0, 1]. Raises BadExampleError for a file, ValueError.
        With `features`, what the last layer is given: float32[N, D].
        """
        c, size = self.config.data, tuple(self.config.data.image_size)
        one = isinstance(images, str | os.PathLike | Image) or getattr(images, "ndim", 0) in (2, 3)
        arrays = (as_array(x, channels=c.channels) for x in ([images] if one else images))
        fitted = [fit_image(array, image_size=size, resize=c.resize) for array in arrays]
        parts = [np.array(fitted, np.uint8).reshape(-1, *size, c.channels)]
        labels = np.zeros(len(fitted), np.int32)
        split = Split("images", parts, labels, range(len(fitted)), self.class_names)
        if features:
            return self.logits(split, quiet=True, step=self._features)
        logits = self.logits(split, quiet=True) / np.float32(self.temperature)
        return np.asarray(self.experiment.task.probabilities(logits))

    def logits(
        self,
        split: Split,
        *,
        views: Callable[[np.ndarray], list[np.ndarray]] = lambda images: [images],
        poll: Callable[[], None] = lambda: None,
        quiet: bool = False,
        step: Callable[..., Any] | None = None,
    ) -> np.ndarray:
        """Logits float32[N, K] of a split's examples, in order.

        Args:
            split: what to evaluate.
            views: uint8[B, H, W, C] -> several such views of the images, whose logits are averaged.
            poll: called before each batch; may raise to stop.
            quiet: show no progress.
            step: in the place of `predict_step`.
        """

        def read(indices: np.ndarray) -> dict[str, np.ndarray]:
            return {str(i): x for i, x in enumerate(views(split.read(indices)["image"]))}

        batch_size = self.experiment.eval_batch_size(len(split))
        rows, step = [np.zeros((0, len(self.class_names)), np.float32)], step or self._predict
        shown = (len(split), f"evaluating {split.name}", "images")
        with tqdm(disable=True) if quiet else progress(*shown) as bar:
            for indices in eval_order(len(split), batch_size=batch_size):
                poll()
                images = put_batch(read, indices, self.experiment.mesh).values()
                logits = [np.asarray(step(self.state, view)) for view in images]
                rows.append(np.asarray(sum(logits) / len(logits))[: int((indices >= 0).sum())])
                bar.update(len(rows[-1]))
        return np.concatenate(rows[1:] or rows)


def load(workdir: str | Path, checkpoint: str | int = "", *, calibrated: bool = True) -> Classifier:
    """The classifier that a run trained, from its config.json and its checkpoints alone.

    Args:
        workdir: of the run.
        checkpoint: "latest", "best" or a step; by default the one that the run's config names.
        calibrated: divide logits by the temperature that `evaluate` fitted on validation for this
            checkpoint, if it did.

    Raises:
        UserError, CheckpointError: see `imgcls.errors`.
    """
    workdir = Path(os.path.expanduser(workdir))
    machine.start()
    config = load_config(workdir)
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    which = config.eval.checkpoint if checkpoint in ("", None) else str(checkpoint)
    meta = checkpoints.read_meta(which)
    experiment = Experiment(config, class_names=meta["class_names"])
    experiment.keep_ops(meta["cpu_kernels"])
    state, meta = checkpoints.restore(which, experiment.state_target())
    best, since = checkpoints.since_best()
    total = config.train.epochs * (meta["train_examples"] // config.train.batch_size)
    if 0 < config.train.patience <= since and checkpoints.validated_step < total:
        meta["stopped_early"] = {"step": checkpoints.validated_step, "best_step": best}
    classifier = Classifier(experiment, state, meta)
    if calibrated:
        classifier.temperature = fitted_temperature(workdir, int(state.step))
    return classifier


def fitted_temperature(workdir: Path, step: int) -> float:
    """The temperature in a results*.json of this step, which is logged; 1 where there is none."""
    for path in sorted(workdir.glob("results*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            results = json.loads(path.read_bytes())
            temperature = results["calibration"]["temperature"]
            if results["step"] == step and 0 < temperature < 100:
                logging.info("calibrated: temperature %.3f of %s", temperature, path)
                return float(temperature)
    return 1.0
