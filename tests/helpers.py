"""What tests share: small configs and runs."""

import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from imgcls.config import default_config, flatten, to_json
from imgcls.data.splits import Split
from imgcls.evaluation.scores import evaluate_logits
from imgcls.experiment import Experiment
from imgcls.run.checkpoint import Checkpoints
from imgcls.run.workdir import write_json

ROOT = Path(__file__).parents[1]


def small_config(model: str = "cnn", **overrides) -> ConfigDict:
    """The digits config, a few steps of it; overrides are dotted keys with __ for the dot."""
    config = importlib.import_module("configs.digits").get_config()
    settings = {
        "data__train": "train[:200]",
        "data__validation": "train[200:290]",
        "data__test": "test[:50]",
        "train__batch_size": 40,
        "train__epochs": 2,
        "train__log_every_steps": 3,
        "train__validate_every_epochs": 1,
        "train__checkpoint_every_epochs": 1,
        "eval__batch_size": 60,
    }
    if model == "cnn":
        settings |= {"model__widths": (8,), "model__dense_widths": (16,)}
    else:
        with config.unlocked():
            config.model = default_config(model).model
    for key, value in (settings | overrides).items():
        section, name = key.split("__") if "__" in key else (None, key)
        (config[section] if section else config)[name] = value
    return config


def all_images(split):
    """uint8[N, H, W, C] of a split."""
    return split.read(np.arange(len(split)))["image"]


def flags_of(config: ConfigDict) -> list[str]:
    """The command line that makes the digits config into this one."""
    default = flatten(importlib.import_module("configs.digits").get_config())
    return [f"--config.{k}={v}" for k, v in flatten(config).items() if default[k] != v]


def as_users() -> dict[str, str]:
    """The environment of a process that compiles as it does for users."""
    return {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}


def read_events(workdir: Path) -> list:
    """TensorBoard's events that one session of a run wrote."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = workdir.glob("events.out.tfevents.*")
    content, events = path.read_bytes(), []
    while content:  # length, its checksum, the event, its checksum
        end = 12 + int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12:end]))
        content = content[end + 4 :]
    return events


def random_logits(examples: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """float32[N, K] that are right more often than not, and int32[N] with every class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(examples, dtype=np.int32) % classes
    logits = rng.normal(size=(examples, classes)).astype(np.float32)
    logits[np.arange(examples), labels] += 2.5
    return logits, labels


def write_run(
    workdir: Path,
    logits: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str] | None = None,
    *,
    temperature: float | None = None,
    ids: Sequence[str] | None = None,
    config: dict | None = None,
    **results,
) -> Path:
    names = class_names or [f"class {k}" for k in range(logits.shape[1])]
    workdir.mkdir(parents=True, exist_ok=True)
    scores = evaluate_logits(logits, labels, names, temperature=temperature)
    (workdir / "results.json").write_text(
        json.dumps({"class_names": list(names)} | scores | results, allow_nan=False)
    )
    (workdir / "config.json").write_text(json.dumps(config or {"seed": 0, "data": {"name": "toy"}}))
    np.savez(
        workdir / "predictions.npz",
        logits=logits,
        labels=labels,
        ids=np.array([f"test/{i}" for i in range(len(labels))] if ids is None else ids),
    )
    return workdir


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
    meta["train_examples"] = examples
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(0, state, meta)
    checkpoints.close()
