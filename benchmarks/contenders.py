"""The same network, batch and optimiser in this project, plain Flax, Keras on JAX, and PyTorch.

A contender is built from a config and a dtype, has a count of trained `parameters`, and does
`train(count)` steps, some also `evaluate(count)` images, returning when they are done. The
alternatives get their images normalised beforehand; this project's step takes uint8, as in main.py.
"""

import importlib
import os
from functools import cache, cached_property, partial

import common  # noqa: F401  (finds imgcls and configs)
import jax
import networks
import numpy as np
import optax
from ml_collections import ConfigDict

from imgcls.config import default_config
from imgcls.data.splits import Split
from imgcls.experiment import Experiment, build_optimizer
from imgcls.inference.classifier import Classifier
from imgcls.run import machine
from imgcls.state import count_parameters

NETWORKS = ("cifar10", "cifar10_resnet18", "airbench94")
CLASSES = 10


def network_config(network: str, *, batch_size: int = 0, dtype: str = "") -> ConfigDict:
    """The config of the network, with its own batch size and dtype where none is given.

    It trains by Nesterov SGD at a constant rate, without augmentation or averages.
    """
    file = "cifar10" if network == "airbench94" else network
    chosen = importlib.import_module(f"configs.{file}").get_config()
    if network == "airbench94":  # arXiv 2404.00498
        chosen.model.widths = (64, 256, 256)
        chosen.train.batch_size = 1000
    config = default_config(chosen.model.name, optimizer="sgd")
    config.update({part: chosen[part] for part in ("data", "task", "model", "eval")})
    config.data.update(validation="", alternate_flip=False)
    config.model.dtype = dtype or chosen.model.dtype
    config.optim.update(learning_rate=0.01, schedule="constant")
    config.optim.weight_decay = chosen.optim.weight_decay
    config.train.batch_size = batch_size or chosen.train.batch_size
    return config


def random_images(config: ConfigDict, count: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8[N, H, W, C] and int32[N]."""
    rng = np.random.default_rng(0)
    shape = (count, *config.data.image_size, config.data.channels)
    return rng.integers(0, 256, shape, np.uint8), rng.integers(0, CLASSES, count).astype(np.int32)


def normalized_batch(config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """The training batch as the network sees it, float32, and its smoothed labels float32[B, K]."""
    images, labels = random_images(config, config.train.batch_size)
    images = (images / np.float32(255) - np.float32(config.data.mean)) / np.float32(config.data.std)
    smoothing = config.task.label_smoothing
    return images, np.eye(CLASSES, dtype=np.float32)[labels] * (1 - smoothing) + smoothing / CLASSES


class Imgcls:
    """This project: the step that main.py compiles, on random images in memory."""

    def __init__(self, config: ConfigDict, examples: int = 0):
        @cache
        def split(count: int) -> Split:
            images, labels = random_images(config, count)
            names = tuple(f"class {k}" for k in range(CLASSES))
            return Split("random", [images], labels, range(count), names)

        machine.start()
        self._split = split
        train = split(examples or config.train.batch_size)
        self.experiment = Experiment(config, splits={"train": train})
        self.state = self.experiment.compile_init()()
        self.parameters = count_parameters(self.state.params)
        self.batch = self.experiment.train_batch(0)

    @cached_property
    def _step(self) -> jax.stages.Compiled:
        return self.experiment.compile_train_step(self.state)

    def train(self, count: int) -> None:
        for _ in range(count):
            self.state, metrics = self._step(self.state, self.batch, self.experiment.rng)
        jax.block_until_ready(metrics)

    @cached_property
    def _classifier(self) -> Classifier:
        return Classifier(self.experiment, self.state, {})

    def evaluate(self, count: int) -> None:
        self._classifier.logits(self._split(count))


class PlainFlax:
    """Linen, optax and jax.jit as in Flax's own examples, with JAX's defaults."""

    def __init__(self, config: ConfigDict):
        model = networks.linen(networks.layers_of(config, CLASSES), config.model.dtype)
        images, labels = map(jax.device_put, normalized_batch(config))
        tx = build_optimizer(config, lambda step: config.optim.learning_rate)
        variables = dict(model.init(jax.random.key(0), images[:1], train=False))
        params = variables.pop("params")
        self.parameters = count_parameters(params)
        self._state = (params, variables, tx.init(params), jax.random.key(1))
        self._batch = images, labels

        @partial(jax.jit, donate_argnums=0)
        def step(state, images, labels):
            params, stats, opt_state, key = state
            key, dropout = jax.random.split(key)

            def loss_fn(params):
                logits, updates = model.apply(
                    {"params": params, **stats},
                    images,
                    train=True,
                    rngs={"dropout": dropout},
                    mutable=["batch_stats"],
                )
                return optax.softmax_cross_entropy(logits, labels).mean(), updates

            (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), stats, opt_state, key), loss

        self._step = step

    def train(self, count: int) -> None:
        for _ in range(count):
            self._state, loss = self._step(self._state, *self._batch)
        loss.block_until_ready()


class Keras:
    """Keras 3 on the JAX backend."""

    def __init__(self, config: ConfigDict):
        os.environ["KERAS_BACKEND"] = "jax"
        import keras

        keras.config.set_dtype_policy(
            "mixed_bfloat16" if config.model.dtype == "bfloat16" else "float32"
        )
        shape, o = (*config.data.image_size, config.data.channels), config.optim
        self._model = networks.keras_model(networks.layers_of(config, CLASSES), shape)
        self._model.compile(
            optimizer=keras.optimizers.SGD(o.learning_rate, o.momentum, nesterov=True),
            loss=keras.losses.CategoricalCrossentropy(from_logits=True),
        )
        self.parameters = sum(int(np.prod(w.shape)) for w in self._model.trainable_weights)
        self._batch = tuple(map(jax.device_put, normalized_batch(config)))

    def train(self, count: int) -> None:
        for _ in range(count):
            self._model.train_on_batch(*self._batch)


class Torch:
    """PyTorch in channels_last; `dtype` "autocast" keeps float32 parameters, "bfloat16" none."""

    def __init__(self, config: ConfigDict, *, compiled: bool):
        import torch

        dtype = config.model.dtype
        memory = {"dtype": torch.bfloat16 if dtype == "bfloat16" else torch.float32}
        memory["memory_format"] = torch.channels_last
        self._torch, self._chunk = torch, config.eval.batch_size
        self._autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=dtype == "autocast")
        images, labels = map(torch.from_numpy, normalized_batch(config))
        self._images, self._labels = images.permute(0, 3, 1, 2).to(**memory), labels
        model = networks.torch_module(networks.layers_of(config, CLASSES))
        model(images[:2].permute(0, 3, 1, 2))
        model.to(**memory)
        for layer in model.modules():
            for name in getattr(layer, "frozen", []):
                getattr(layer, name).requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.parameters, o = sum(p.numel() for p in trained), config.optim
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": o.weight_decay},
            {"params": [p for p in trained if p.ndim == 1]},
        ]
        options = {"lr": o.learning_rate, "momentum": o.momentum, "nesterov": True, "fused": True}
        self._optimizer = torch.optim.SGD(groups, **options)
        self._model = torch.compile(model) if compiled else model

    def train(self, count: int) -> None:
        self._model.train()
        for _ in range(count):
            self._optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                logits = self._model(self._images)
            self._torch.nn.functional.cross_entropy(logits.float(), self._labels).backward()
            self._optimizer.step()

    def evaluate(self, count: int) -> None:
        self._model.eval()
        if len(self._images) != count:
            images = self._images.repeat(-(-count // len(self._images)), 1, 1, 1)[:count]
            self._images = images.contiguous(memory_format=self._torch.channels_last)
        with self._torch.inference_mode(), self._autocast():
            self._torch.cat([self._model(part) for part in self._images.split(self._chunk)])


BUILDERS = {
    "imgcls": Imgcls,
    "flax": PlainFlax,
    "keras": Keras,
    "torch-eager": partial(Torch, compiled=False),
    "torch-compile": partial(Torch, compiled=True),
}
