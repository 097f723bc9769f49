"""Compiles the training step for accelerators that are not here, and reads the programs.

    pip install -r requirements.txt -r requirements-tpu-test.txt     # in an environment of its own
    JAX_PLATFORMS=cpu python benchmarks/accelerators.py [--only=NAME ...]

Nothing is run. Bounds are those of the compiler's counts of operations and of bytes over what the
chip can do at most (`CHIPS`); a real step takes longer than the larger of them.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import re
from collections.abc import Iterator
from unittest import mock

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")

import common
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from imgcls.data.splits import Split
from imgcls.experiment import Experiment
from imgcls.parallel import replicated, split_by_example
from imgcls.run import machine
from imgcls.run.workdir import read_json, write_json

# Most FLOP/s in bfloat16, bytes/s of its memory, GiB of memory: cloud.google.com/tpu/docs.
CHIPS = {
    "v4": (275e12, 1228e9, 32),
    "v5e": (197e12, 819e9, 16),
    "v6e": (918e12, 1640e9, 32),
}
# Name, chip configuration, chips a host, and whether the axes close to rings: of MaxText's tables.
TOPOLOGIES = {
    "v4-8": ("v4:2x2x1", "megacore", (2, 2, 1), None),  # four chips, each one device
    "v5e-1": ("v5e:1x1", "default", (1, 1, 1), None),
    "v5e-8": ("v5e:2x4", "default", (2, 2, 1), None),
    "v5e-256": ("v5e:16x16", "default", (2, 2, 1), (True, True, False)),
    "v6e-8": ("v6e:2x4", "default", (2, 2, 1), None),
}
# Config, topology, and the keys that differ.
IMAGENET = {
    "data.image_size": (224, 224),
    "model.depth": 50,
    "model.stem": "imagenet",
    "train.batch_size": 1024,
    "train.small_epochs": 0.0,
    "augment.translate_pixels": 0,
    "augment.cutout_pixels": 0,
    "augment.crop_fraction": 0.92,
}
CASES = {
    "digits on v5e-256": ("digits", "v5e-256", {"train.batch_size": 256}),
    "cifar10 on v5e-1": ("cifar10", "v5e-1", {"train.batch_size": 512}),
    "cifar10 on v5e-8": ("cifar10", "v5e-8", {"train.batch_size": 512}),
    "cifar10 on v6e-8": ("cifar10", "v6e-8", {"train.batch_size": 512}),
    "cifar10 on v4-8": ("cifar10", "v4-8", {"train.batch_size": 512}),
    "ResNet-50 on v5e-8": ("cifar10_resnet18", "v5e-8", IMAGENET),
}
COLLECTIVES = ["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"]
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


def devices_of(topology: str) -> list:
    """The devices of a machine that is not here; its compiler (libtpu) has to be."""
    name, chip, bounds, wrap = TOPOLOGIES[topology]
    options = {"chip_config_name": chip, "chips_per_host_bounds": bounds, "num_slices": 1}
    options |= {"wrap": wrap} if wrap else {}
    found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    return list(found.devices)


@contextlib.contextmanager
def experiment_on(
    config: str, platform: str, devices: list | None = None, changes: dict | None = None
) -> Iterator[Experiment]:
    """An `Experiment` as it would be there, on images that are not read.

    Without devices it has those of this process, for lowering.
    """
    c = importlib.import_module(f"configs.{config}").get_config()
    c.update_from_flattened_dict(changes or {})
    # What a config leaves open, an `Experiment` decides by its images.
    examples, shape = 4 * (c.train.batch_size or 64), (*c.data.image_size, c.data.channels)
    shape = shape if len(shape) == 3 else (64, 64, c.data.channels)
    images = np.broadcast_to(np.zeros((), np.uint8), (examples, *shape))
    classes = tuple(map(str, range(1000 if shape[0] == 224 else 10)))
    labels = np.arange(examples, dtype=np.int32) % len(classes)
    split = Split("train", [images], labels, range(examples), classes)
    with mock.patch("jax.default_backend", lambda: platform):
        experiment = Experiment(c, splits=dict.fromkeys(("train", "validation", "test"), split))
        if devices:
            experiment.mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
            experiment.everywhere = replicated(experiment.mesh)
        with mock.patch("jax.device_count", lambda: experiment.mesh.size):
            yield experiment


def traced(experiment: Experiment, what: str) -> jax.stages.Traced:
    """The program "train", "small", "eval", "predict" or "init", ready to be lowered."""
    c, e = experiment.config, experiment
    shaped = lambda s, dtype, place: jax.ShapeDtypeStruct(s, dtype, sharding=place)
    key = shaped((), jax.random.key(0).dtype, e.everywhere)
    if what == "init":
        sample = shaped((2, *c.data.image_size, c.data.channels), jnp.float32, e.everywhere)
        return e.jit(e.init_of(e.model), once=True).trace(key, sample)
    split, size = split_by_example(e.mesh), len(e.order[0])
    kinds = {"image": jnp.uint8, "label": jnp.int32, "mask": jnp.bool_}
    kinds |= {"mirrored": jnp.bool_} if c.data.alternate_flip and what in ("train", "small") else {}
    shapes = {"image": (size, *c.data.image_size, c.data.channels)}
    batch = {name: shaped(shapes.get(name, (size,)), kinds[name], split) for name in kinds}
    state = e.state_target()
    if what == "eval":
        return e.jit_eval_step().trace(state, batch)
    if what == "predict":
        return e.jit_predict_step().trace(state, batch["image"])
    return e.jit_train_step(small=what == "small").trace(state, batch, key)


def compile_train_step(name: str, *, quick: bool = False) -> tuple[Experiment, jax.stages.Compiled]:
    """The training step of one of CASES.

    `quick` takes a fifth of the time; collectives, dtypes and arrays are the same, memory is more.
    """
    config, topology, changes = CASES[name]
    effort = -1.0 if quick else 0.0
    efforts = ("jax_exec_time_optimization_effort", "jax_memory_fitting_effort")
    for option in efforts:
        jax.config.update(option, effort)
    try:
        with experiment_on(config, "tpu", devices_of(topology), changes) as experiment:
            return experiment, traced(experiment, "train").lower().compile()
    finally:
        for option in efforts:
            jax.config.update(option, 0.0)


def collectives(text: str) -> list[tuple[str, list[tuple[str, int]]]]:
    """Of a compiled program: the kind of each, with dtype and bytes of the arrays that travel."""
    operation = rf"^\s*(?:ROOT )?%\S+ = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\("
    found = []
    for result, kind in re.findall(operation, text, re.M):
        arrays = re.findall(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]", result)
        size = lambda dims: math.prod(int(n) for n in dims.split(",") if n)
        found.append((kind, [(dtype, size(dims) * BYTES[dtype]) for dtype, dims in arrays]))
    return found


def measure(name: str) -> dict:
    """The compiler's counts for one chip, and the bounds that follow from them."""
    experiment, compiled = compile_train_step(name)
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    flops, bandwidth, _ = CHIPS[CASES[name][1].split("-")[0]]
    milliseconds = {
        "FLOPs": 1e3 * cost["flops"] / flops,
        "bandwidth": 1e3 * cost["bytes accessed"] / bandwidth,
    }
    moved: dict[str, float] = {}
    for kind, arrays in collectives(text):
        moved[kind] = moved.get(kind, 0) + sum(size for _, size in arrays) / 1e6
    return {
        "batch": experiment.config.train.batch_size,
        "chips": experiment.mesh.size,
        "GiB": memory.peak_memory_in_bytes / 2**30,
        "MB_between_chips": moved,
        "flops": cost["flops"],
        "milliseconds": milliseconds,
        "bound_by": max(milliseconds, key=milliseconds.get),
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    path = common.RESULTS / "accelerators.json"
    for name in parser.parse_args().only:
        row = measure(name) | machine.describe()
        row["versions"]["libtpu"] = importlib.metadata.version("libtpu")
        print(name, json.dumps(row), flush=True)
        write_json(path, (read_json(path) if path.exists() else {}) | {name: row})


if __name__ == "__main__":
    main()
