"""What this machine's JAX is told, and what decides speed and bits on it."""

import functools
import glob
import importlib.metadata
import logging
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil

from imgcls.errors import CheckpointError
from imgcls.run.files import cache_folder

ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel[0-9]*", "/dev/vfio/[0-9]*")  # GPUs, TPUs
# Use YNNPACK for single matrix products only. XLA would also give it convolutions (2-4x slower than
# Eigen) and fused products (2x slower in Muon).
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
QUICK_TO_COMPILE = {"xla_backend_optimization_level": "1"}  # in half the time
CACHE_BYTES = 2 * 2**30  # of compiled programs; the least recently used go first


def start() -> None:
    """To be called once by a process, before JAX computes anything."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("xla")))
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
        # Small programs, too: compiled anew, the start-up check of oneDNN takes a second longer.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    visible = [path for kind in ACCELERATORS for path in glob.glob(kind)]
    if visible and jax.default_backend() == "cpu" and os.environ.get("JAX_PLATFORMS") != "cpu":
        logging.warning(
            "THIS MACHINE HAS AN ACCELERATOR (%s) BUT JAX RUNS ON THE CPU: install jax[cuda13] or "
            "jax[tpu] as the README says, or set JAX_PLATFORMS=cpu to silence this",
            visible[0],
        )


@functools.cache
def compiler_options(*, once: bool = False) -> dict[str, str] | None:
    """Options for `jax.jit` on this backend, of what runs `once` or often; XLA_FLAGS go first."""
    options = QUICK_TO_COMPILE if once else CPU_OPTIONS
    flags = os.environ.get("XLA_FLAGS", "")
    if jax.default_backend() != "cpu" or any(name in flags for name in options):
        return None
    try:
        jax.jit(jnp.negative, compiler_options=options)(1.0)
    except jax.errors.JaxRuntimeError:  # another jaxlib, without these options
        return None
    return options


def check_memory(compiled: jax.stages.Compiled) -> None:
    """Raises MemoryError where a program for the CPU needs more than is free.

    XLA would wait for ever, or Linux end the process without a word. Accelerators tell themselves.
    """
    if jax.default_backend() == "cpu" and (needs := compiled.memory_analysis()):
        needed = needs.output_size_in_bytes + needs.temp_size_in_bytes - needs.alias_size_in_bytes
        free = psutil.virtual_memory().available
        if needed > free:
            raise MemoryError(f"{needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} are free")


def reproducibility_facts() -> dict[str, Any]:
    """What decides the last bits of a run, besides its config, its data and this code."""
    device = jax.devices()[0]
    facts = {
        "jaxlib": importlib.metadata.version("jaxlib"),
        "devices": f"{jax.device_count()} x {device.platform} {_cpu_model() or device.device_kind}",
        "prng": jax.config.jax_default_prng_impl,  # type: ignore[attr-defined]
    }
    # XLA has a thread for each core.
    return facts | ({"cpu_cores": cpu_cores()} if device.platform == "cpu" else {})


def check_reproducible(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Warns of facts that differ from those of the session that saved the checkpoint.

    Raises:
        CheckpointError: random numbers would be those of another generator.
    """
    if saved.get("prng", now["prng"]) != now["prng"]:
        raise CheckpointError(
            f"this run draws its random numbers with {saved['prng']}, but JAX is set to "
            f"{now['prng']}: set JAX_DEFAULT_PRNG_IMPL={saved['prng']}"
        )
    other = [f"{k} was {v}, is {now.get(k)}" for k, v in saved.items() if v != now.get(k)]
    if other:
        told = "the run goes on, but its last bits will differ from those of one never stopped: %s"
        logging.warning(told, "; ".join(other))


def cores() -> list[int]:
    """Their numbers, of those that this process may use; see `cpu_cores`."""
    there = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(cpu_cores())
    return sorted(there)[: cpu_cores()]


def cpu_cores() -> int:
    """Those that this process may use, where the system tells (Linux), else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str | None:
    """Such as "AMD EPYC 9R14"; None on an accelerator, and where Linux does not tell."""
    info = Path("/proc/cpuinfo")
    if jax.default_backend() != "cpu" or not info.exists():
        return None
    found = re.search(r"model name\s*: (.*)", info.read_text())
    return found and found[1]


@functools.cache  # the commit is that of the code which runs, whatever is checked out later
def describe() -> dict[str, Any]:
    """The device, the versions and the commit behind a number."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else f"{os.cpu_count()} CPU cores"
    return {
        "device": f"{jax.device_count()} x {device.platform} ({kind})",
        "versions": {name: importlib.metadata.version(name) for name in names},
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of this code, with "+" where files were changed since; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Results of benchmarks do not count: each would make the next one's commit look changed.
        changed = git("status", "--porcelain", "-uno", ":/", ":(top,exclude)benchmarks/results")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
