"""Every test runs on four simulated devices, and writes to no cache but its session's own."""

import os
import tempfile

if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has its controller's
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="imgcls-test-cache-")
os.environ.pop("TFDS_DATA_DIR", None)
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of a test's time is compilation, of programs that run once.
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = FAST_COMPILATION
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import importlib
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from imgcls.config import default_config, flatten

jax.config.update("jax_num_cpu_devices", 4)

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


def run_main(*arguments, **options) -> subprocess.CompletedProcess:
    """python main.py in a process of its own, on one device; its output as text."""
    command = [sys.executable, str(ROOT / "main.py"), *map(str, arguments)]
    options = {"capture_output": True, "text": True, "timeout": 300, "env": as_users()} | options
    return subprocess.run(command, **options)


def as_users() -> dict[str, str]:
    """The environment of a process that compiles as it does for users."""
    return {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}


@pytest.fixture(autouse=True)
def _no_leftover_state(monkeypatch):
    monkeypatch.chdir(ROOT)
