"""From a config to what it names: the rules a config must keep, and the objects built from it.

Only this module, `backend`, the training loop and the commands see a config; the rest takes plain
arguments.
"""

import difflib
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from imgcls import cpu
from imgcls.augment import compose, resized
from imgcls.data import splits
from imgcls.data.sources import open_sources
from imgcls.errors import UserError
from imgcls.models import MODELS
from imgcls.models.resnet import STAGES
from imgcls.optim import OPTIMIZERS, SCHEDULES, create_optimizer, create_schedule
from imgcls.run import machine
from imgcls.run.workdir import read_json
from imgcls.steps import augment_batch, normalize


def _one_of(*names: str) -> tuple[type, Callable[[Any], bool], str]:
    return str, lambda x: x in names, f"one of {', '.join(names)}"


ANY_TEXT = (str, lambda x: True, "text")
COUNT = (int, lambda x: x >= 1, "a whole number of at least 1")
COUNT_OR_ZERO = (int, lambda x: x >= 0, "a whole number of at least 0")
POSITIVE = (float, lambda x: 0 < x < math.inf, "a number over 0")
NOT_NEGATIVE = (float, lambda x: 0 <= x < math.inf, "a number of at least 0")
FRACTION = (float, lambda x: 0 <= x < 1, "a number of at least 0 and under 1")
FLAG = (bool, lambda x: True, "True or False")
COUNTS = (tuple, lambda x: all(type(n) is int and n > 0 for n in x), "a tuple of positive integers")
SIZE = (tuple, lambda x: len(x) == 2 and COUNTS[1](x), "(height, width)")
CHANNELS = (
    tuple,
    lambda x: all(type(n) in (int, float) and math.isfinite(n) for n in x),
    "a number for each channel, as a tuple",
)

# Every key that a config has beside `augment`'s and the model's own, and what it may be.
RULES = {
    "seed": COUNT_OR_ZERO,
    "data.name": (str, bool, "a dataset's name"),
    "data.dir": ANY_TEXT,
    "data.train": (str, bool, "a TFDS split string such as train[:90%]"),
    "data.validation": ANY_TEXT,
    "data.test": (str, bool, "a TFDS split string such as test"),
    "data.image_size": SIZE,
    "data.channels": (int, lambda x: x in (1, 3), "1 or 3"),
    "data.resize": _one_of("squash", "crop"),
    "data.mean": CHANNELS,
    "data.std": (tuple, lambda x: CHANNELS[1](x) and all(n > 0 for n in x), CHANNELS[2]),
    "data.skip_bad": COUNT_OR_ZERO,
    "data.follow_links": FLAG,
    "data.alternate_flip": FLAG,
    "model.name": _one_of(*MODELS),
    "model.dtype": _one_of("float32", "bfloat16"),
    "model.matmul_precision": _one_of("default", "high", "highest"),
    "model.cpu_kernels": _one_of("auto", "off"),
    "optim.name": _one_of(*OPTIMIZERS),
    "optim.learning_rate": POSITIVE,
    "optim.adam_learning_rate": POSITIVE,
    "optim.dense_learning_rate": POSITIVE,
    "optim.bias_learning_rate": POSITIVE,
    "optim.schedule": _one_of(*SCHEDULES),
    "optim.warmup_epochs": NOT_NEGATIVE,
    "optim.momentum": FRACTION,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.clip_norm": NOT_NEGATIVE,
    "optim.label_smoothing": FRACTION,
    "optim.ema_decay": FRACTION,
    "train.batch_size": COUNT,
    "train.accumulate_steps": COUNT,
    "train.epochs": COUNT,
    "train.early_epochs": NOT_NEGATIVE,
    "train.early_image_size": SIZE,
    "train.log_every_steps": COUNT,
    "train.validate_every_epochs": COUNT,
    "train.checkpoint_every_epochs": COUNT,
    "train.max_bad_steps": COUNT_OR_ZERO,
    "eval.batch_size": COUNT,
    "eval.checkpoint": _one_of("latest", "best"),
}

# What a model's own field may be; of others the type of its default decides.
MODEL_RULES = {
    "resnet.depth": (int, lambda x: x in STAGES, f"one of {', '.join(map(str, STAGES))}"),
    "resnet.stem": _one_of("cifar", "imagenet"),
    "wide_resnet.depth": (int, lambda x: x >= 10 and x % 6 == 4, "6 n + 4, such as 16 or 28"),
}

# What may differ between the runs of one workdir: it does not change the result.
HARMLESS = {
    "data.dir",
    "model.cpu_kernels",
    "train.log_every_steps",
    "train.checkpoint_every_epochs",
    "eval.batch_size",
}


def validate(config: ConfigDict) -> None:
    """Raises UserError for the first key that is missing, unknown or out of its range."""
    flat = flatten(config)
    _check("model.name", flat, *RULES["model.name"])  # it decides which keys there may be
    model_fields = _model_fields(flat["model.name"])
    known = {*RULES, *(f"model.{field}" for field in model_fields)}
    for key in flat:
        if key not in known and not key.startswith("augment."):
            raise UserError(f"config.{key} is not a key this config can have{_nearest(key, known)}")
    for key, (kind, accepts, expected) in RULES.items():
        _check(key, flat, kind, accepts, expected)
    for field, default in model_fields.items():
        by_type = {bool: FLAG, int: COUNT, float: FRACTION, tuple: COUNTS, str: ANY_TEXT}
        rule = MODEL_RULES.get(f"{flat['model.name']}.{field}", by_type[type(default)])
        _check(f"model.{field}", flat, *rule)
    for key in ("data.mean", "data.std"):
        if len(flat[key]) != flat["data.channels"]:
            raise UserError(f"config.{key}={flat[key]}: give one number for each of the channels")
    if flat["eval.checkpoint"] == "best" and not flat["data.validation"]:
        raise UserError("config.eval.checkpoint=best needs a config.data.validation to be best on")
    if flat["train.batch_size"] % (jax.device_count() * flat["train.accumulate_steps"]):
        raise UserError(
            f"config.train.batch_size={flat['train.batch_size']} must be a multiple of the "
            f"{jax.device_count()} devices times config.train.accumulate_steps="
            f"{flat['train.accumulate_steps']}"
        )
    if flat["eval.batch_size"] % jax.device_count():
        raise UserError(
            f"config.eval.batch_size={flat['eval.batch_size']} must be a multiple of the "
            f"{jax.device_count()} devices"
        )
    for key in ("optim.warmup_epochs", "train.early_epochs"):
        if flat[key] > flat["train.epochs"]:
            raise UserError(
                f"config.{key}={flat[key]} is more than config.train.epochs={flat['train.epochs']}"
            )
    if flat["data.alternate_flip"] and flat.get("augment.flip_probability"):
        raise UserError(
            "config.data.alternate_flip takes the place of random flips: set "
            "config.augment.flip_probability=0.0, or alternate_flip=False"
        )
    if flat["model.name"] == "mlp" and flat["train.early_epochs"]:
        raise UserError("config.train.early_epochs must be 0 for an mlp, made for one image size")
    build_augment(config)


def _check(key: str, flat: dict[str, Any], kind: type, accepts: Callable, expected: str) -> None:
    if key not in flat:
        raise UserError(f"config.{key} is missing: it is {expected}")
    value = flat[key]
    right_type = isinstance(value, kind) or (kind is float and type(value) is int)
    if not right_type or (type(value) is bool) != (kind is bool) or not accepts(value):
        raise UserError(f"config.{key}={value!r} must be {expected}")


def _nearest(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    return f": did you mean config.{near[0]}?" if near else ""


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"optim.learning_rate": 0.1, ...}"""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def to_json(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON types: what is saved, and what saved configs are compared with."""
    return json.loads(json.dumps(config.to_dict()))


def load_config(workdir: Path) -> ConfigDict:
    """The config of a run, from its config.json: never Python from a workdir."""
    config = ConfigDict(_tuples(read_json(workdir / "config.json")))
    validate(config)
    return config


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(value) if isinstance(value, list) else value


def check_resumable(saved: dict[str, Any], config: ConfigDict, workdir: Path) -> None:
    """Raises UserError where a config would not continue the run that a workdir holds."""
    old, new = flatten(saved), flatten(to_json(config))
    differing = {k for k in old.keys() | new.keys() if old.get(k) != new.get(k)} - HARMLESS
    if differing == {"train.epochs"} and new["train.epochs"] > old["train.epochs"]:
        if new["optim.schedule"] == "constant":
            return
        raise UserError(
            f"{workdir} was trained for config.train.epochs={old['train.epochs']} with the "
            f"{new['optim.schedule']} schedule, which depends on it: more epochs would be another "
            "run; use another --workdir (with the constant schedule they can be added)"
        )
    if differing:
        shown = ", ".join(f"{k}={new.get(k)!r} (was {old.get(k)!r})" for k in sorted(differing))
        raise UserError(f"{workdir} holds a run of another config: {shown}; use another --workdir")


def open_splits(config: ConfigDict, *names: str) -> list[splits.Split]:
    """The splits that config.data names "train", "validation" or "test", decoded."""
    c = config.data
    sources = open_sources(
        c.name, data_dir=c.dir or None, channels=c.channels, follow_links=c.follow_links
    )
    if c.validation:
        for other in (c.train, c.test):
            if splits.overlapping(sources, c.validation, other):
                raise UserError(
                    f"config.data.validation={c.validation!r} shares examples with {other!r}"
                )
    if splits.overlapping(sources, c.train, c.test):
        raise UserError(f"config.data.train={c.train!r} shares examples with {c.test!r}")
    return splits.load_splits(
        sources,
        [c[name] for name in names],
        image_size=tuple(c.image_size),
        channels=c.channels,
        resize=c.resize,
        skip_bad=c.skip_bad,
    )


def compute_dtype(config: ConfigDict) -> str:
    """`config.model.dtype`, but float32 on CPUs without bfloat16 instructions or without oneDNN.

    With AVX2 a step took 17 times as long in bfloat16 as in float32.
    """
    dtype = config.model.dtype
    slow = dtype == "bfloat16" and jax.default_backend() == "cpu" and not cpu.has_bfloat16()
    return "float32" if slow else dtype


def cpu_ops(config: ConfigDict) -> dict[str, Callable[..., Any]]:
    """What a model on this CPU takes in the place of Linen's operations (see `cpu.ops`), or {}."""
    return {} if config.model.cpu_kernels == "off" else cpu.ops(compute_dtype(config))


def kept_ops(ops: dict[str, Callable], begun_with: list[str] | bool) -> dict[str, Callable]:
    """Those of `ops` that a run began with: its "cpu_kernels" in the metadata of a checkpoint.

    Older runs have True there, or False for all but the convolutions.
    """
    if isinstance(begun_with, bool):
        begun_with = [name for name in ops if begun_with or name != "conv"]
    return {name: op for name, op in ops.items() if name in begun_with}


def reproducibility_facts(
    ops: dict[str, Callable], saved: dict[str, Any] | None = None
) -> dict[str, Any]:
    """`machine.reproducibility_facts`, and what decides the bits of `ops`.

    With the facts that a run `saved`, oneDNN takes as many threads as it had then.
    """
    facts = machine.reproducibility_facts() | {"cpu_kernels": sorted(ops)}
    if "conv" not in ops:
        return facts
    if saved and "openmp_threads" in saved:
        cpu.use_threads(saved["openmp_threads"])
    return facts | cpu.identity()


def build_model(
    config: ConfigDict, num_classes: int, *, ops: dict[str, Callable] | None = None
) -> nn.Module:
    """The Linen module, with those of `ops` that are fields of it."""
    fields = {k: config.model[k] for k in _model_fields(config.model.name)}
    if config.model.name == "cnn":
        _check_pooling(config, len(fields["widths"]))
    # The whole process's: a program takes it when it is traced, in training and prediction alike.
    jax.config.update("jax_default_matmul_precision", config.model.matmul_precision)
    model = MODELS[config.model.name]
    injected = {k: op for k, op in (ops or {}).items() if k in model.__dataclass_fields__}
    dtype = jnp.dtype(compute_dtype(config))
    return model(num_classes=num_classes, dtype=dtype, **injected, **fields)


def _check_pooling(config: ConfigDict, blocks: int) -> None:
    keys = ["data.image_size", *(["train.early_image_size"] if config.train.early_epochs else [])]
    for key in keys:
        section, name = key.split(".")
        smaller = config.model.whiten and not config.model.pad_whitening
        if min(config[section][name]) - smaller < 2**blocks:
            raise UserError(
                f"config.model.widths={config.model.widths} halves the image {blocks} times, too "
                f"often for config.{key}={config[section][name]}"
            )


def _model_fields(name: Any) -> dict[str, Any]:
    """The model's own fields with their defaults; empty for an unknown name."""
    if name not in MODELS:
        return {}
    fields = MODELS[name].__dataclass_fields__
    given = {"num_classes", "dtype", "conv", "norm", "pool", "act", "parent", "name"}
    return {k: f.default for k, f in fields.items() if k not in given}


def build_preprocess(config: ConfigDict) -> Callable[[jax.Array], jax.Array]:
    return partial(normalize, mean=tuple(config.data.mean), std=tuple(config.data.std))


def build_augment(
    config: ConfigDict, *, early: bool = False
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`early`: for the first epochs, on smaller images."""
    augment = compose(**config.get("augment", {}))
    return resized(augment, tuple(config.train.early_image_size)) if early else augment


def build_schedule(config: ConfigDict, *, steps_per_epoch: int) -> optax.Schedule:
    return create_schedule(
        config.optim.schedule,
        learning_rate=config.optim.learning_rate,
        warmup_steps=round(config.optim.warmup_epochs * steps_per_epoch),
        total_steps=config.train.epochs * steps_per_epoch,
    )


def build_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    o = config.optim
    own = {"muon": ("adam",), "muon_sgd": ("dense", "bias")}.get(o.name, ())
    options = {f"{part}_ratio": o[f"{part}_learning_rate"] / o.learning_rate for part in own}
    return create_optimizer(
        o.name,
        schedule,
        momentum=o.momentum,
        weight_decay=o.weight_decay,
        clip_norm=o.clip_norm,
        **options,
    )


def augmented_images(config: ConfigDict, batch: dict[str, Any], num_classes: int) -> jax.Array:
    """The images of the first batch as training sees them: float[B, H, W, C] in [0, 1]."""
    rng, _ = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0))
    augment = build_augment(config, early=config.train.early_epochs > 0)
    apply = partial(augment_batch, augment=augment, num_classes=num_classes)
    return jax.jit(apply)(rng, batch)[0]
