"""Weights to start from, `config.model.init_from`: those of an own run, of a file, of a hub."""

import contextlib
import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from imgcls import config as configs
from imgcls.errors import UserError, did_you_mean, first_line, printable
from imgcls.experiment import Experiment
from imgcls.inference.classifier import load
from imgcls.models import head_of
from imgcls.models.names import UNUSED, fitting, from_torch
from imgcls.run import processes
from imgcls.run.logs import say
from imgcls.state import TrainState

IMAGENET = {"data.mean": (0.485, 0.456, 0.406), "data.std": (0.229, 0.224, 0.225)}
HALF = {"data.mean": (0.5, 0.5, 0.5), "data.std": (0.5, 0.5, 0.5)}
SAVE = "s.save_file(torch.load('IN.pth', weights_only=True), 'OUT.safetensors')"
OFFERED = "name a workdir, a .safetensors file, or one on huggingface.co: timm/resnet18.a1_in1k"
FAMILIES = {"vit": "vit|deit", "efficientnet_lite": "efficientnet"}  # others are as timm's
SHAPELESS = ("model.heads", "model.pad_whitening")  # no array's shape tells of a wrong one


class Weights(NamedTuple):
    arrays: dict[str, np.ndarray]  # by names such as layer1_0_bn1_scale
    facts: dict[str, Any]  # path, sha256 and, of a hub, revision
    expects: dict[str, Any]  # values of config.data that they were trained with
    fits: dict[str, Any]  # values of config.model, and of config.data, that fit them
    class_names: tuple[str, ...] = ()  # of an own run, whose last layer is for them
    image_size: tuple[int, int] = (1, 1)  # of an own run; else of the same proportions


def open_weights(name: str) -> Weights:
    """Reads a workdir, a .safetensors file, or a model of huggingface.co.

    Raises UserError where there is none, or where a file could run code.
    """
    path, facts = Path(os.path.expanduser(name)), dict[str, Any](path=name)
    if os.path.isdir(path / "checkpoints"):
        run = load(path, calibrated=False)
        variables = flatten_dict(jax.device_get(run.state.eval_variables))
        arrays = {"_".join(path[1:]): array for path, array in variables.items()}
        facts |= {"step": int(run.state.step), "sha256": digest(arrays)}
        return Weights(arrays, facts, class_names=run.class_names, **of_config(run.config))
    if path.suffix.lower() in (".pth", ".pt", ".bin", ".h5", ".ckpt", ".pkl", ".tar"):
        raise UserError(
            f"{printable(name)} is not read, because it could run code: convert it where torch is "
            f'installed, with python -c "import torch, safetensors.torch as s; {SAVE}"'
        )
    if not os.path.exists(path):
        beside = path.parent.glob("*/checkpoints") if os.path.isdir(path.parent) else ()
        runs = [checkpoints.parent for checkpoints in beside]
        if near := did_you_mean(path.name, [run.name for run in runs], runs):
            raise UserError(f"config.model.init_from={printable(name)} does not exist: {near}")
        if re.fullmatch(r"[\w-]+/[\w.-]+(?<!\.safetensors)", name):
            path = _download(name)
            facts["revision"] = path.parent.name
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe may take for ever
            raise OSError(0, "it is neither a regular file nor the workdir of a run")
        with path.open("rb") as content:
            facts["sha256"] = hashlib.file_digest(content, "sha256").hexdigest()
        with safetensors.safe_open(path, framework="flax") as file:  # numpy lacks bfloat16
            names = [name for name in file.offset_keys() if not UNUSED.search(name)]
            named = {name: np.asarray(file.get_tensor(name)) for name in names}
            metadata = file.metadata() or {}
    except (OSError, AttributeError, safetensors.SafetensorError) as error:  # float8 is unknown
        why = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"config.model.init_from={printable(name)} cannot be read ({why}): {OFFERED}"
        ) from error
    arrays = from_torch(named)
    try:
        known = of_config(configs.from_json(json.loads(metadata["config"])))  # of an own export
    except Exception:  # there may be none, or anything in it
        fits = fitting(arrays)
        known = {"expects": _expected(path, named, fits.get("model.name", "")), "fits": fits}
    return Weights(arrays, facts, **known)


def digest(arrays: dict[Any, Any]) -> str:
    """SHA-256 of arrays and their names."""
    state = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        state.update(f"{name} {array.dtype}{array.shape}\n".encode() + np.asarray(array).tobytes())
    return state.hexdigest()


def of_config(config: ConfigDict) -> dict[str, Any]:
    """What the config of a run tells of its weights."""
    flat = configs.flatten(config)
    size = r"|data\.image_size" * (flat["model.name"] == "mlp")
    own = re.compile(r"data\.channels|model\.(?!init_from|dtype|cpu_kernels|matmul)" + size)
    fits = {key: value for key, value in flat.items() if own.match(key)}
    expects = {key: flat[key] for key in (*IMAGENET, "data.resize")}
    return {"expects": expects, "fits": fits, "image_size": flat["data.image_size"]}


def _download(name: str) -> Path:
    """The file in huggingface_hub's cache, beside the model's config.json."""
    try:
        import huggingface_hub as hub

        say(f"asking huggingface.co for {name} (without a network, for half a minute)")
        path = Path(hub.hf_hub_download(name, "model.safetensors"))
        with contextlib.suppress(Exception):  # not every model has one
            hub.hf_hub_download(name, "config.json")
        return path
    except Exception as error:  # whatever its HTTP client raises
        missing = isinstance(error, ImportError)
        why = "needs pip install -r requirements-hub.txt" if missing else first_line(error)
        raise UserError(
            f"config.model.init_from={name}: there is no such file or run here, and huggingface.co "
            f"did not give it ({why}): check the name, or download model.safetensors and "
            f"config.json of https://huggingface.co/{name}, and name the former"
        ) from None


def _expected(path: Path, named: dict[str, np.ndarray], model: str) -> dict[str, Any]:
    """What timm's config.json beside a file of a model says of the images; else what is usual."""
    # timm's vision transformers, but for DINOv2, and Lite have 0.5.
    half = {"pos_embed", "conv_stem.weight"} & {*named} and "blocks.0.ls1.gamma" not in named
    expects, how = (HALF, "bicubic") if half else (IMAGENET, "bilinear")
    try:
        told = json.loads(path.with_name("config.json").read_bytes())
        if not re.search(FAMILIES.get(model, model), told.get("architecture", model)):
            raise ValueError  # another file's, in the same folder
        told = told.get("pretrained_cfg", told)
        expects = {f"data.{key}": tuple(map(float, told[key])) for key in ("mean", "std")}
        how = told.get("interpolation")
    except Exception:  # there may be none, or anything in it
        say(f"{path} has no config.json of its own: the usual mean and deviation are taken")
    return expects | {"data.resize": "squash-bicubic" if how == "bicubic" else "squash"}


def prepare(config: ConfigDict) -> tuple[ConfigDict, Weights | None]:
    """Opens the weights, if any, which decide what the config leaves: mean, interpolation, widths.

    Raises UserError where they are not of this model; no data is needed to tell.
    """
    if not config.model.init_from:
        if config.optim.backbone_ratio == configs.OPEN["optim.backbone_ratio"]:
            raise UserError(f"config.model.init_from is empty, and this config needs it: {OFFERED}")
        if not config.optim.backbone_ratio or config.train.probe_epochs:
            logging.warning("no config.model.init_from: the last layer learns on random features")
        return config, None
    weights = open_weights(config.model.init_from)
    processes.check_same(lambda: {"config.model.init_from": weights.facts["sha256"]})
    left, told = configs.left_open(config), weights.fits | weights.expects
    config = configs.completed(config, told)
    own = configs.flatten(config)
    for key, value in told.items():
        as_good = key == "data.resize" and own[key].split("-")[1:] == value.split("-")[1:]  # a crop
        if key in left:
            say(f"config.{key}={value}, as the weights expect")
        elif not as_good and own.get(key, value) != value and key in (*weights.expects, *SHAPELESS):
            logging.warning("config.%s=%s, but the weights expect %s", key, own[key], value)
    defaults = {key: entry.default for key, entry in configs.keys_of(config).items()}
    like = Experiment(configs.completed(config, defaults), class_names=("", ""))
    fit(weights, like.state_target(), like.config)
    configs.validate(config)
    return config, weights


def fit(weights: Weights, target: TrainState, config: ConfigDict) -> dict[Any, np.ndarray]:
    """The arrays of all but the last layer, by their path in the variables of `target`.

    Raises UserError that names arrays which are missing, left over, of another shape, or no finite
    numbers.
    """
    leaves, head = flatten_dict(target.eval_variables), head_of(target.params)
    paths = {"_".join(path[1:]): path for path in leaves if path[1] != head}
    given = {n: a for n, a in weights.arrays.items() if n not in (f"{head}_kernel", f"{head}_bias")}
    found, wrong = {}, []
    for name in sorted(paths.keys() & given.keys()):
        array, shape = given[name], leaves[paths[name]].shape
        if name == "pos_embed" and array.size and array.shape[::2] == shape[::2]:
            array = resample(array, shape[1], config.data.image_size, weights.image_size)
        if [n for n in array.shape if n != 1] != [n for n in shape if n != 1]:
            wrong.append(f"{name} is {list(array.shape)}, and {list(shape)} here")
        elif not (jax.numpy.issubdtype(array.dtype, np.floating) and np.isfinite(array).all()):
            wrong.append(f"{name} is not of finite floats")
        found[paths[name]] = array
    for names, told in ((paths.keys() - given, "missing"), (given.keys() - paths, "left over")):
        wrong += [f"{len(names)} arrays are {told}, such as {min(names)}"] if names else []
    if wrong:
        flat = configs.flatten(config)
        other = [f"config.{k}={v}" for k, v in sorted(weights.fits.items()) if flat.get(k) != v]
        told = f"{weights.facts['path']} is not of this config.model: {'; '.join(wrong[-3:])}"
        remedy = f"set {', '.join(other)}?" if other else "name another file or run"
        raise UserError(printable(f"{told}: {remedy}"))
    return {path: array.reshape(leaves[path].shape) for path, array in found.items()}


def resample(
    embedding: np.ndarray, tokens: int, image_size: tuple[int, int], of: tuple[int, int] = (1, 1)
) -> np.ndarray:
    """Position embeddings [1, P + N, C], P of no place, as [1, tokens, C], a grid for an image.

    N are of a grid for an image of the proportions `of`. Cubic with antialiasing, as in timm.
    """

    def grid(tokens: int, size: tuple[int, int]) -> tuple[int, int]:
        rows = max(int((tokens * size[0] / size[1]) ** 0.5), 1)
        return rows, rows * size[1] // size[0]

    old, new = grid(embedding.shape[1], of), grid(tokens, image_size)
    first, width = embedding.shape[1] - old[0] * old[1], embedding.shape[2]
    places = embedding[:, first:].reshape(1, *old, width)
    places = np.asarray(jax.image.resize(places, (1, *new, width), "cubic"))
    return np.concatenate([embedding[:, :first], places.reshape(1, -1, width)], axis=1)


def take_over(
    state: TrainState, weights: Weights, exp: Experiment
) -> tuple[TrainState, dict[str, Any]]:
    """A first state with these weights, and facts on them.

    The last layer is theirs if they are of a run with the same classes; else it starts at zero.
    """
    keeps, arrays = weights.class_names == exp.class_names, fit(weights, state, exp.config)
    for path, leaf in flatten_dict(state.eval_variables).items():
        head = weights.arrays["_".join(path[1:])] if keeps else np.zeros(leaf.shape)
        arrays[path] = jax.device_put(arrays.get(path, head).astype(leaf.dtype), leaf.sharding)
    taken = unflatten_dict(arrays)
    # Copies: one buffer under two names could not be donated.
    ema = None if state.ema_params is None else jax.tree.map(jax.numpy.copy, taken["params"])
    state = state.replace(**taken, ema_params=ema)
    return state, weights.facts | {"last layer": "kept" if keeps else "new"}


def told(meta: dict[str, Any]) -> list[str]:
    """A line, which is said, too, of what a run started from; none if it began at random."""
    facts = ", ".join(f"{key} {value}" for key, value in meta.get("init_from", {}).items())
    if facts:
        say(f"started from {facts}")
    return [f"started from {facts}"] if facts else []
