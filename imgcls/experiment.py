"""From a config to what it names: `Experiment` has a run's data, model and compiled steps."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from imgcls import cpu
from imgcls.arguments import harmless
from imgcls.augment import Augment, compose, resized
from imgcls.config import from_json, left_open, own_values, validate
from imgcls.data.opening import open_splits, resolve
from imgcls.data.order import TrainOrder, eval_order
from imgcls.data.splits import Split
from imgcls.errors import UserError
from imgcls.models import MODELS, head_of
from imgcls.optim import OPTIMIZERS, create_optimizer, create_schedule
from imgcls.parallel import make_mesh, put_batch, replicated
from imgcls.probe import LastLayer, frozen_step, restarted_step
from imgcls.run import machine
from imgcls.run.signals import interruptibly
from imgcls.run.workdir import read_json
from imgcls.state import TrainState, create_state
from imgcls.steps import (
    Batch,
    augment_batch,
    eval_step,
    normalize,
    predict_step,
    step_keys,
    train_step,
)
from imgcls.task import TASKS, Task

EMA_SETTLES = 30  # steps


class Experiment:
    """What a config names, each thing built once, when it is first asked for.

    Attributes:
        config: valid, without open values: see `data.opening.resolve`.
        ops: operations that the model takes in the place of Linen's, from `cpu.ops`. A resumed run
            keeps those that it began with (`keep_ops`).
        total_steps, steps_per_epoch, small_steps: small ones are the first, on smaller images.
            In the first `frozen_steps` the last layer learns alone, from `features`.
    """

    def __init__(
        self,
        config: ConfigDict,
        *,
        class_names: Sequence[str] | None = None,
        splits: dict[str, Split] | None = None,
        task: Task | None = None,
        test: bool = True,
    ):
        """Args:
        config: of the run. What it leaves open its training split decides, which is opened then.
        class_names: of a trained model, whose data need not be there.
        splits: in the place of those that the config names.
        task: in the place of the one that the config names.
        test: False leaves the test split unopened.
        """
        self._class_names, self._given, self._task, self._test = class_names, splits, task, test
        self._sources, self._opened = None, dict[str, Split]()
        if left_open(config):
            config, self._sources, self._opened = interruptibly(partial(resolve, config, splits))
            validate(config)
        self.config = config
        self.features: Any = None  # set before frozen steps: `imgcls.features.kept_features`
        self.mesh = make_mesh()
        self.everywhere = replicated(self.mesh)
        self.ops = {} if config.model.cpu_kernels == "off" else cpu.ops(compute_dtype(config))
        mean, std = tuple(config.data.mean), tuple(config.data.std)
        self.preprocess = partial(normalize, mean=mean, std=std)

    @functools.cached_property
    def splits(self) -> dict[str, Split]:
        """ "train", "test" and, where the config has it, "validation"; opened and decoded."""
        if self._given is not None:
            return self._given
        names = ["train", *(["test"] if self._test else [])]
        names += ["validation"] if self.config.data.validation else []
        more = [name for name in names if name not in self._opened]
        opened = zip(more, open_splits(self.config, *more, sources=self._sources))
        return self._opened | dict(opened)

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self._class_names or self.splits["train"].class_names)

    @functools.cached_property
    def order(self) -> TrainOrder:
        c, train = self.config, self.splits["train"]
        parts = jax.device_count() * c.train.accumulate_steps
        if c.train.batch_size % parts:
            raise UserError(
                f"config.train.batch_size={c.train.batch_size} must be a multiple of the "
                f"{jax.device_count()} devices times config.train.accumulate_steps="
                f"{c.train.accumulate_steps}: the nearest is "
                f"{max(min(round(c.train.batch_size / parts), len(train) // parts), 1) * parts}"
            )
        if len(train) < c.train.batch_size:
            raise UserError(
                f"config.train.batch_size={c.train.batch_size} is more than the {len(train)} "
                f"examples of {train.name}: lower it"
            )
        return TrainOrder(len(train), batch_size=c.train.batch_size, seed=c.seed)

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.config.train.epochs * self.steps_per_epoch

    @property
    def small_steps(self) -> int:
        return round(self.config.train.small_epochs * self.steps_per_epoch)

    @property
    def frozen_steps(self) -> int:
        share = self.config.train.probe_epochs * self.steps_per_epoch
        return round(share) if self.config.optim.backbone_ratio else self.total_steps

    @functools.cached_property
    def task(self) -> Task:
        if self._task is not None:
            return self._task
        task = TASKS[self.config.task.name]
        own = own_values(self.config, "task", task)
        if own.get("class_weights", "none") != "none" and self._class_names is None:
            counts = np.bincount(self.splits["train"].labels, minlength=len(self.class_names))
            own["class_counts"] = tuple(counts.tolist())
        return task(**own)

    @functools.cached_property
    def model(self) -> nn.Module:
        return build_model(self.config, len(self.class_names), self.ops)

    def keep_ops(self, begun_with: list[str] | bool) -> None:
        """Leaves out operations with which the run did not begin: "cpu_kernels" of a checkpoint.

        Older checkpoints tell of convolutions alone, by True or False.
        """
        if isinstance(begun_with, bool):
            begun_with = ["act", "norm", "pool", *(["conv"] if begun_with else [])]
        self.ops = {name: op for name, op in self.ops.items() if name in begun_with}

    def reproducibility_facts(self, saved: dict[str, Any] | None = None) -> dict[str, Any]:
        """What decides the last bits of a run, besides its config, its data and this code.

        The number of OpenMP threads is set to that of `saved`, the facts of an earlier session.
        """
        facts = machine.reproducibility_facts() | {"cpu_kernels": sorted(self.ops)}
        if "conv" not in self.ops:
            return facts
        if saved and "openmp_threads" in saved:
            cpu.use_threads(saved["openmp_threads"])
        return facts | cpu.identity()

    @functools.cached_property
    def schedule(self) -> optax.Schedule:
        o, steps = self.config.optim, {"total_steps": self.total_steps}
        steps["warmup_steps"] = round(o.warmup_epochs * self.steps_per_epoch)
        probe = (o.probe_learning_rate, self.frozen_steps)
        return create_schedule(o.schedule, learning_rate=o.learning_rate, probe=probe, **steps)

    @functools.cached_property
    def rng(self) -> jax.Array:
        """The key from which, with the step, all of training's randomness comes."""
        older = not hasattr(jax, "enable_x64")  # before 0.8
        x64 = jax.experimental.enable_x64 if older else jax.enable_x64  # type: ignore
        with x64(True):  # else a key has the lower half of the seed alone
            key = partial(jax.random.key, self.config.seed)
            return jax.jit(key, out_shardings=self.everywhere)()

    def augmentation(self, *, small: bool) -> Augment:
        """What the training step applies; `small`: in the first epochs, on smaller images."""
        augment = compose(**self.config.augment)
        return resized(augment, tuple(self.config.train.small_image_size)) if small else augment

    def train_batch(self, step: int) -> Batch:
        read: Callable = partial(self._read_train, step=step)
        if self.features and step < self.frozen_steps:  # of whose views epochs take one each
            view = step // self.steps_per_epoch % self.config.train.probe_views
            read = lambda indices: {name: x[view, indices] for name, x in self.features.items()}
        return put_batch(read, self.order[step], self.mesh)

    def _read_train(self, indices: np.ndarray, *, step: int) -> dict[str, np.ndarray]:
        batch = self.splits["train"].read(indices)
        if self.config.data.alternate_flip and step >= self.frozen_steps:
            batch["mirrored"] = self.order.mirrored(indices, step)
        return batch

    def eval_batches(self, split: str) -> Iterator[Batch]:
        examples = self.splits[split]
        for indices in eval_order(len(examples), batch_size=self.eval_batch_size(len(examples))):
            yield put_batch(examples.read, indices, self.mesh)

    def eval_batch_size(self, examples: int) -> int:
        """The config's, rounded up to what the devices can share, but no more than are needed."""
        devices = jax.device_count()
        # A few images do not pay for a whole batch; powers of two keep the compiled programs few.
        enough = devices << max(0, -(-examples // devices) - 1).bit_length()
        return min(-(-self.config.eval.batch_size // devices) * devices, enough)

    def may_be_best(self, step: int) -> bool:
        """Whether the validation of a step may make its checkpoint the best.

        BatchNorm's statistics are of the parameters, not of their average. In the first steps the
        two are far apart, and the average is then far worse than it could be.
        """
        return not self.config.optim.ema_decay or step >= min(EMA_SETTLES, self.total_steps)

    def phase(self, step: int) -> dict[str, bool]:
        """Which of the training programs a step has: the arguments of `jit_train_step`."""
        return {"small": step < self.small_steps, "frozen": step < self.frozen_steps}

    def augmented_images(self, step: int = 0) -> jax.Array:
        """The images of a step's batch as the network sees them: float32[B, H, W, C] in [0, 1]."""
        phase = self.phase(step)
        augment = compose() if phase["frozen"] else self.augmentation(small=phase["small"])
        how: Any = {"task": self.task, "num_classes": len(self.class_names)}
        apply = partial(augment_batch, augment=augment, **how)
        batch = self._read_train(self.order[step], step=step)
        return jax.jit(apply)(step_keys(self.rng, step)[0], batch)[0]

    def jit(self, function: Callable, *, once: bool = False, **options: Any) -> jax.stages.Wrapped:
        """`jax.jit` with this machine's compiler options, and the config's matmul precision within
        the program. Results are on every device. `once` is for what runs once."""

        def program(*arguments):
            with jax.default_matmul_precision(self.config.model.matmul_precision):
                return function(*arguments)

        options |= {"compiler_options": machine.compiler_options(once=once)}
        return jax.jit(program, out_shardings=self.everywhere, **options)

    def init_of(self, model: nn.Module) -> Callable[..., TrainState]:
        """(rng, normalised images) -> the first state, which no schedule changes."""
        tx = build_optimizer(self.config, lambda step: self.config.optim.learning_rate)
        return partial(create_state, model=model, tx=tx, ema=self.config.optim.ema_decay > 0)

    def compile_init(self) -> Callable[[], TrainState]:
        """The program that makes the first state."""
        arrays = jax.tree.leaves(self.state_target())  # before XLA is given too much of them
        machine.check_fits(sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays))
        sample = self.preprocess(self.splits["train"].read(self.order[0])["image"])
        program = self.jit(self.init_of(self.model), once=True).lower(self.rng, sample).compile()
        machine.check_memory(program)
        return partial(program, self.rng, sample)

    def jit_train_step(self, *, small: bool = False, frozen: bool = False) -> jax.stages.Wrapped:
        """`train_step` as (state, batch, rng) -> (state, metrics). The state is donated.

        `small`: the program of the first epochs, on smaller images. `frozen`: that of the last
        layer, on features.
        """
        c, begins = self.config, 0 if frozen else self.frozen_steps
        step: Any = train_step
        images: Any = {"model": self.model, "preprocess": self.preprocess}
        if frozen:
            head = head_of(self.state_target().params)
            step, images = frozen_step, {"model": LastLayer(len(self.class_names), head)}
        elif begins:
            step = partial(restarted_step, at=begins)
        step = partial(
            step,
            **images,
            tx=build_optimizer(c, lambda count: self.schedule(begins + count)),
            augment=self.augmentation(small=small),
            task=self.task,
            ema_decay=c.optim.ema_decay,
            accumulate_steps=c.train.accumulate_steps,
            unroll=jax.default_backend() == "cpu",
        )
        return self.jit(step, donate_argnums=0)

    def compile_train_step(self, state: TrainState, **how: bool) -> jax.stages.Compiled:
        """`jit_train_step`, compiled for `state`: arrays, or their shapes with shardings."""
        with nn.intercept_methods(_refuse_constants):
            batch = self.train_batch(0 if how.get("frozen") else self.frozen_steps)
            lowered = self.jit_train_step(**how).lower(state, batch, self.rng)
        program = lowered.compile()
        machine.check_memory(program)
        return program

    def jit_eval_step(self) -> jax.stages.Wrapped:
        """`eval_step` as (state, batch) -> metrics."""
        step = partial(eval_step, model=self.model, preprocess=self.preprocess, task=self.task)
        return self.jit(step)

    def compile_eval_step(self, state: TrainState) -> jax.stages.Compiled:
        """`jit_eval_step`, compiled for batches of validation."""
        return self.jit_eval_step().lower(state, next(self.eval_batches("validation"))).compile()

    def jit_predict_step(self, step: Callable[..., Any] = predict_step) -> jax.stages.Wrapped:
        """`predict_step`, or `features_step`, as (state, images) -> logits, or features."""
        return self.jit(partial(step, model=self.model, preprocess=self.preprocess))

    def state_target(self) -> TrainState:
        """The shapes, dtypes and places of the arrays of the state."""
        create = self.init_of(build_model(self.config, len(self.class_names)))
        sample = jnp.zeros((1, *self.config.data.image_size, self.config.data.channels))
        shapes = jax.eval_shape(create, jax.random.key(0), sample)
        placed = partial(jax.ShapeDtypeStruct, sharding=self.everywhere)
        return jax.tree.map(lambda x: placed(x.shape, x.dtype), shapes)


def _refuse_constants(call: Callable, arguments: Any, keywords: Any, context: Any) -> Any:
    """For `nn.intercept_methods`: BatchNorm in training makes a constant of a single value."""
    if isinstance(context.module, nn.BatchNorm) and not context.module.use_running_average:
        shape = arguments[0].shape
        if math.prod(shape[:-1]) == 1:
            raise UserError(
                f"config.train.batch_size over accumulate_steps is 1, and BatchNorm of {shape} has "
                "one value per channel, of which it makes a constant: raise config.train.batch_size"
            )
    return call(*arguments, **keywords)


def load_config(workdir: Path) -> ConfigDict:
    """The config of a run, from its config.json: never Python from a workdir.

    The flags of `arguments.define_harmless` replace values.
    """
    config = from_json(read_json(workdir / "config.json"))
    config.update_from_flattened_dict(harmless())
    validate(config)
    return config


def build_model(
    config: ConfigDict, num_classes: int, ops: dict[str, Callable] | None = None
) -> nn.Module:
    """The Linen module, with those of `ops` that are fields of it."""
    model = MODELS[config.model.name]
    own: Any = {name: op for name, op in (ops or {}).items() if name in model.__dataclass_fields__}
    own |= {"num_classes": num_classes, "dtype": jnp.dtype(compute_dtype(config))}
    return model(**own, **own_values(config, "model", model))


def compute_dtype(config: ConfigDict) -> str:
    """`config.model.dtype`, but float32 on CPUs without bfloat16 instructions or without oneDNN.

    With AVX2 a step took 17 times as long in bfloat16 as in float32.
    """
    if (dtype := config.model.dtype) == "bfloat16":
        machine.tell_of_bfloat16()
    slow = dtype == "bfloat16" and jax.default_backend() == "cpu" and not cpu.has_bfloat16()
    return "float32" if slow else dtype


def build_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    o, shared = config.optim, ("learning_rate", "clip_norm", "backbone_ratio", "layer_decay")
    own = own_values(config, "optim", OPTIMIZERS[o.name])
    return create_optimizer(o.name, schedule, **{key: o[key] for key in shared}, **own)
