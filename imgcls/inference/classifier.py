"""A trained model ready for use: `load("runs/cifar10")(images)` gives probabilities."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from imgcls import experiment
from imgcls.data.images import fit_image
from imgcls.data.splits import Split, eval_order
from imgcls.parallel import make_mesh, put_batch, replicated
from imgcls.run import machine
from imgcls.run.checkpoint import Checkpoints
from imgcls.run.logs import progress
from imgcls.state import TrainState, create_state
from imgcls.steps import predict_step


class Classifier:
    """A model with its parameters and its preprocessing.

    Attributes:
        config: of the run.
        class_names: by index.
        state: of training; `state.step` tells which checkpoint.
        meta: what the run saved beside the state.
    """

    def __init__(self, config: ConfigDict, model: Any, state: TrainState, meta: dict[str, Any]):
        self.config, self.model, self.state, self.meta = config, model, state, meta
        self.class_names = tuple(meta["class_names"])
        self.preprocess = experiment.build_preprocess(config)
        self.mesh = make_mesh()
        self._predict = jax.jit(
            partial(predict_step, model=model, preprocess=self.preprocess),
            out_shardings=replicated(self.mesh),
            compiler_options=machine.compiler_options(),
        )

    def __call__(self, images: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        """Probabilities float32[N, K] of images uint8[N, h, w, C], or a sequence of uint8[h, w, C].

        Images of another size than the model's are resized as they were in training.
        """
        c = self.config.data
        size = tuple(c.image_size)
        fitted = np.empty((len(images), *size, c.channels), np.uint8)
        for i, image in enumerate(map(np.asarray, images)):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != c.channels:
                raise ValueError(
                    f"an image must be uint8[h, w, {c.channels}], not {image.dtype}{image.shape}"
                )
            fitted[i] = fit_image(image, image_size=size, resize=c.resize)
        zeros = np.zeros(len(fitted), np.int32)
        split = Split("images", fitted, zeros, range(len(fitted)), self.class_names)
        rows = [np.zeros((0, len(self.class_names)), np.float32), *self._batches(split)]
        return np.asarray(jax.nn.softmax(np.concatenate(rows)))

    def logits(self, split: Split, *, poll: Callable[[], None] = lambda: None) -> np.ndarray:
        """Logits float32[N, K] of a split's examples, in order; `poll` runs before each batch."""
        rows = []
        with progress(len(split), f"evaluating {split.name}", "images") as bar:
            for logits in self._batches(split, poll):
                rows.append(logits)
                bar.update(len(logits))
        return np.concatenate(rows)

    def _batches(
        self, split: Split, poll: Callable[[], None] = lambda: None
    ) -> Iterator[np.ndarray]:
        # A few images do not pay for a whole batch; powers of two keep the compiled programs few.
        devices = jax.device_count()
        enough = devices << max(0, -(-len(split) // devices) - 1).bit_length()
        batch_size = min(self.config.eval.batch_size, enough)
        for indices in eval_order(len(split), batch_size=batch_size):
            poll()
            images = put_batch(split.read, indices, self.mesh)["image"]
            yield np.asarray(self._predict(self.state, images))[: int((indices >= 0).sum())]


def load(workdir: str | Path, checkpoint: str = "") -> Classifier:
    """The classifier that a run trained, from its config.json and its checkpoints alone.

    Args:
        workdir: of the run.
        checkpoint: "latest", "best" or a step; by default the one that the run's config names.

    Raises:
        UserError, CheckpointError: see `imgcls.errors`.
    """
    workdir = Path(workdir)
    machine.start()
    config = experiment.load_config(workdir)
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    step = str(checkpoints.find(checkpoint or config.eval.checkpoint))
    meta = checkpoints.read_meta(step)
    ops = experiment.kept_ops(experiment.cpu_ops(config), meta["cpu_kernels"])
    model = experiment.build_model(config, len(meta["class_names"]), ops=ops)
    state, meta = checkpoints.restore(step, state_target(config, model))
    return Classifier(config, model, state, meta)


def state_target(config: ConfigDict, model: Any) -> TrainState:
    """The shapes, dtypes and places of the arrays of a run's state."""
    # Only the shape of the optimiser's state matters here, and no schedule changes that.
    tx = experiment.build_optimizer(config, lambda step: config.optim.learning_rate)
    create = partial(create_state, model=model, tx=tx, ema=config.optim.ema_decay > 0)
    sample = jnp.zeros((1, *config.data.image_size, config.data.channels))
    everywhere = replicated(make_mesh())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        jax.eval_shape(create, jax.random.key(0), sample),
    )
