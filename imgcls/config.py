"""What a config may hold: defaults, validation, JSON, and what older runs had.

A config file returns `default_config(model=..., optimizer=...)` with what its experiment chooses
otherwise. The fields of a model or a task and the keywords of an optimiser or an augmentation are
keys, too: their defaults are read from its signature, their meanings from its docstring.
"""

import inspect
import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from imgcls import augment, optim
from imgcls.errors import UserError, meant
from imgcls.keys import (
    BY_TYPE,
    GIVEN,
    HARMLESS,
    KEYS,
    LARGEST,
    OPEN,
    OWN_RULES,
    RENAMED,
    Key,
    Rule,
    up_to,
    whole,
)
from imgcls.models import MODELS
from imgcls.task import TASKS


def default_config(
    model: str = "cnn", optimizer: str = "adamw", task: str = "classification"
) -> ConfigDict:
    """Every key that a config with these components has, at its default; locked.

    Args:
        model: a name of `MODELS`, which a depth may follow: "resnet50".
        optimizer: a name of `OPTIMIZERS`.
        task: a name of `TASKS`.
    """
    chosen: dict[str, Any] = {"model.name": model, "optim.name": optimizer, "task.name": task}
    match = model not in MODELS and re.fullmatch(r"(\w+?)(\d+)", model)
    if match and hasattr(MODELS.get(match[1]), "depth"):
        chosen |= {"model.name": match[1], "model.depth": int(match[2])}
    keys = keys_of(chosen)
    return _nested({key: chosen.get(key, keys[key].default) for key in keys})


def keys_of(config: Any) -> dict[str, Key]:
    """The keys of a config, flat or not, with the model, optimiser and task that it names."""
    keys, flat = dict(KEYS), flatten(config)
    for section, table in (("task", TASKS), ("model", MODELS), ("optim", optim.OPTIMIZERS)):
        name: Any = flat.get(f"{section}.name")
        _check(f"{section}.name", name, KEYS[f"{section}.name"].rule)
        keys |= _own_keys(section, name, table[name])
    for name, function in augment.AUGMENTATIONS.items():
        meaning = (inspect.getdoc(function) or "").partition("\n")[0]
        off, rule = 0.0, up_to(augment.LIMITS.get(name, math.inf))
        if name.endswith("_pixels"):
            off, rule = 0, whole(0, LARGEST)
        keys[f"augment.{name}"] = Key(off, rule, meaning)
        keys |= _own_keys("augment", name, function)
    order = list(dict.fromkeys(key.partition(".")[0] for key in (*KEYS, "augment.")))
    return dict(sorted(keys.items(), key=lambda item: order.index(item[0].partition(".")[0])))


def _own_keys(section: str, name: str, component: Callable) -> dict[str, Key]:
    meanings = dict(re.findall(r"^ +(\w+): (.+)", inspect.getdoc(component) or "", re.M))
    keys = {}
    for p in inspect.signature(component).parameters.values():
        if p.default is not p.empty and p.name not in GIVEN:
            rule = OWN_RULES.get(f"{name}.{p.name}", OWN_RULES.get(f"{section}.{p.name}"))
            rule = rule or BY_TYPE[type(p.default)]
            keys[f"{section}.{p.name}"] = Key(p.default, rule, meanings.get(p.name, ""))
    return keys


def own_values(config: ConfigDict, section: str, component: Callable) -> dict[str, Any]:
    """The values of a component's own keys, to call it with."""
    keys = _own_keys(section, config[section].get("name", ""), component)
    return {name: config[section][name] for name in (key.partition(".")[2] for key in keys)}


def validate(config: ConfigDict | dict[str, Any]) -> None:
    """Raises UserError for the first key that is missing, unknown or out of its range."""
    flat = flatten(config)
    keys = keys_of(flat)
    for key in [*flat, *keys]:
        if key not in keys or key not in flat:
            raise UserError(_wrong_key(key, flat, keys))
    for key, value in flat.items():
        _check(key, value, keys[key].rule)
    for key in ("data.mean", "data.std"):
        if flat[key] and len(flat[key]) != flat["data.channels"]:
            raise UserError(
                f"config.{key}={flat[key]} must have a number for each of the "
                f"config.data.channels={flat['data.channels']}: set --config.{key}, too"
            )
    for key in ("eval.checkpoint", "train.patience"):
        if flat[key] not in (0, "latest") and not flat["data.validation"]:
            raise UserError(f"config.{key}={flat[key]} needs a config.data.validation")
    if not flat["train.epochs"] and not flat["train.steps"]:
        raise UserError("config.train.epochs=0 must be at least 1 where config.train.steps=0")
    most = flat["train.epochs"] or math.inf
    for key in ("optim.warmup_epochs", "train.small_epochs", "train.probe_epochs"):
        if flat[key] > most:
            raise UserError(f"config.{key}={flat[key]} is more than config.train.epochs={most}")
    if flat["data.alternate_flip"] and flat["augment.flip_probability"]:
        raise UserError(
            "config.data.alternate_flip takes the place of random flips: set "
            "config.augment.flip_probability=0.0, or alternate_flip=False"
        )
    if flat["train.small_epochs"]:
        if not flat["train.small_image_size"]:
            raise UserError("config.train.small_epochs needs a config.train.small_image_size")
        if (name := flat["model.name"]) in ("mlp", "vit"):
            raise UserError(f"config.train.small_epochs must be 0: {name} is made for one size")
        if flat["train.probe_epochs"] or not flat["optim.backbone_ratio"]:
            raise UserError("config.train.small_epochs must be 0 where the last layer learns alone")
    if flat["optim.layer_decay"] < 1 and flat["model.name"] in ("cnn", "mlp"):
        raise UserError("config.optim.layer_decay must be 1: it is for vit, convnext and resnet")
    _check_model(flat)


def _check(key: str, value: Any, rule: Rule) -> None:
    right_type = isinstance(value, rule.kind) or (rule.kind is float and type(value) is int)
    right = right_type and (type(value) is bool) == (rule.kind is bool)
    try:
        right = right and rule.accepts(float(value) if rule.kind is float else value)
    except OverflowError:  # of hundreds of digits
        right = False
    if not right:
        raise UserError(f"config.{key}={value!r} must be {rule.expected}")


def _check_model(flat: dict[str, Any]) -> None:
    name, widths = flat["model.name"], flat.get("model.widths", ())
    if name == "convnext" and not 0 < len(widths) == len(flat["model.depths"]):
        raise UserError("config.model.widths and depths need one number each per stage")
    if name == "vit" and flat["model.width"] % flat["model.heads"]:
        raise UserError("config.model.width must be a multiple of config.model.heads")
    smaller = name == "cnn" and flat["model.whiten"] and not flat["model.pad_whitening"]
    halvings = {"cnn": len(widths), "convnext": len(widths) + 1}.get(name, 0)
    sizes = ["data.image_size", *(["train.small_image_size"] if flat["train.small_epochs"] else [])]
    for key in sizes:
        if name == "vit" and any(side % flat["model.patch"] for side in flat[key]):
            raise UserError(f"config.{key}={flat[key]} must be multiples of config.model.patch")
        if flat[key] and min(flat[key]) - smaller < 2**halvings:
            raise UserError(
                f"config.model.widths={widths} halves the image {halvings} times, too often for "
                f"config.{key}={flat[key]}"
            )


def _wrong_key(key: str, flat: dict[str, Any], keys: dict[str, Key]) -> str:
    """What to say of a key that should not be there, or is missing."""
    section, near = key.partition(".")[0], meant(f"config.{key}", [f"config.{k}" for k in keys])
    own = [k for k in keys if k.startswith(f"{section}.") and k not in KEYS]
    lacks = ", ".join(k.partition(".")[2] for k in own) * any(k not in flat for k in own)
    if section in ("model", "optim", "task") and (lacks or "did" not in near):
        name, part = flat[f"{section}.name"], {"optim": "optimizer"}.get(section, section)
        why = f"has keys that this config lacks ({lacks})" if lacks else f"has no {key}"
        offered = f"--config=FILE.py:{name} where the config offers it, or " * (section == "model")
        return (
            f"config.{section}.name={name} {why}: choose it with {offered}"
            f'default_config({part}="{name}") in the config file'
        )
    if key not in keys:
        return f"config.{key} is not a key of this config: {near}"
    return f"config.{key} is missing: it must be {keys[key].rule.expected}"


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"optim.learning_rate": 0.1, ...}"""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict) and (value or not prefix):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = {} if isinstance(value, ConfigDict) else value  # an empty one
    return flat


def _nested(flat: dict[str, Any]) -> ConfigDict:
    config = ConfigDict()
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        (config[section] if section else config)[name] = value
    return config.lock()


def to_json(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON types: what is saved, and what saved configs are compared with."""
    return json.loads(json.dumps(config.to_dict()))


def chosen(config: ConfigDict) -> dict[str, Any]:
    """{key: value} in JSON types: what decides a run's results and is not at its default."""
    keys, flat = keys_of(config), flatten(config)
    own = {k: v for k, v in flat.items() if not keys[k].harmless and v != keys[k].default}
    return json.loads(json.dumps(own))


def from_json(saved: dict[str, Any]) -> ConfigDict:
    """The config of a run, completed if it is of an older version of this code; validated.

    A key that it lacks gets the default, which is what the older code did. Keys that went since
    are left out, with a warning unless they are another optimiser's, which older configs had.
    """
    flat = {RENAMED.get(key, key): _tuples(value) for key, value in flatten(saved).items()}
    keys = keys_of({"task.name": "classification"} | flat)
    foreign = {
        f"optim.{k}" for f in optim.OPTIMIZERS.values() for k in inspect.signature(f).parameters
    }
    if gone := flat.keys() - keys.keys() - foreign:
        logging.warning("config keys that this version no longer has: %s", ", ".join(sorted(gone)))
    flat = {key: value for key, value in flat.items() if key in keys}
    completed = {key: entry.default for key, entry in keys.items()} | flat
    validate(completed)
    return _nested(completed)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def left_open(config: ConfigDict) -> list[str]:
    """The keys of the config that the training pictures decide."""
    return [key for key, value in flatten(config).items() if key in OPEN and value == OPEN[key]]


def completed(config: ConfigDict, values: dict[str, Any]) -> ConfigDict:
    """A copy of the config that takes what it leaves open from `values`, by key."""
    return _nested(flatten(config) | {k: values[k] for k in left_open(config) if k in values})


def check_resumable(saved: ConfigDict, config: ConfigDict, workdir: Path) -> None:
    """Raises UserError where a config would not continue the run that a workdir holds."""
    old, new = flatten(to_json(saved)), flatten(to_json(config))
    differing = {k for k in old.keys() | new.keys() if old.get(k) != new.get(k)}
    differing -= set(HARMLESS)
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
