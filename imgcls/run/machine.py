"""What this machine's JAX is told, and what decides speed and bits on it."""

import contextlib
import functools
import glob
import importlib.metadata
import logging
import os
import re
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from filelock import FileLock, Timeout

from imgcls.errors import CheckpointError, UserError, first_line
from imgcls.run.files import cache_folder

ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel[0-9]*", "/dev/vfio/[0-9]*")  # GPUs, TPUs
# Use YNNPACK for single matrix products only. XLA would also give it convolutions (2-4x slower than
# Eigen) and fused products (2x slower in Muon, and NaN in bfloat16 with jaxlib 0.12).
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
QUICK_TO_COMPILE = {"xla_backend_optimization_level": "1"}  # in half the time
CACHE_BYTES = 2 * 2**30  # of compiled programs; the least recently used go first
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def start() -> None:
    """To be called once by a process, before JAX computes anything."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        keep_programs()
    platforms = os.environ.get("JAX_PLATFORMS", "")
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # there is none, or another process has it
        raise UserError(
            f"JAX cannot start with JAX_PLATFORMS={platforms} ({first_line(error)}): free the "
            "device, install its plugin, or set JAX_PLATFORMS=cpu"
        ) from error
    visible = accelerators()
    if visible and backend == "cpu" != platforms:
        logging.warning(
            "THIS MACHINE HAS AN ACCELERATOR (%s) BUT JAX RUNS ON THE CPU: install jax[cuda13] or "
            "jax[tpu] as the README says, or set JAX_PLATFORMS=cpu to silence this",
            visible[0],
        )


@functools.cache
def keep_programs() -> None:
    """Has JAX keep compiled programs on the disk."""
    folder = cache_folder("xla")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
    except OSError as error:
        logging.warning("compiled programs are not kept in %s (%s)", folder, error.strerror)
        return
    keys = {path.name.rpartition("-")[0] for path in folder.glob("*-*e")}
    with contextlib.suppress(OSError, Timeout):
        if broken := [key for key in keys if not _is_whole(folder, key)]:
            with FileLock(folder / ".lockfile", timeout=10):  # JAX's own
                for key in broken:
                    if not _is_whole(folder, key):  # as before: it was not being written
                        for part in ("cache", "atime"):
                            (folder / f"{key}-{part}").unlink(missing_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    # A full disk is no reason for a warning for each program.
    warnings.filterwarnings("ignore", "Error (read|writ)ing persistent compilation cache")
    # Small programs, too: compiled anew, the start-up check of oneDNN takes a second longer.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _is_whole(folder: Path, key: str) -> bool:
    """Whether a program of JAX's cache, and the time of its last use, are what JAX can read.

    A kill or a full disk leaves a part. Without the time, nothing more would be kept.
    """
    path = folder / f"{key}-cache"
    try:
        from jax._src.compilation_cache import decompress_executable  # another JAX may lack it

        (folder / f"{key}-atime").stat()
        # The year 1970 tells the programs that were looked at, and not written since.
        if path.stat().st_mtime or not path.stat().st_size:
            decompress_executable(path.read_bytes())
            os.utime(path, (0, 0))
    except Exception as error:  # zlib and zstd have their own; other errors of reading pass
        unknown = isinstance(error, OSError | ImportError)
        return unknown and not isinstance(error, FileNotFoundError)
    return True


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


@functools.cache
def tell_of_bfloat16() -> None:
    """Says, once, that a GPU such as Colab's T4 has none."""
    capability = getattr(jax.devices()[0], "compute_capability", "")
    if re.fullmatch(r"[1-7]\.\d", capability):
        told = "this GPU (compute capability %s) has no bfloat16: it computes in float32, no faster"
        logging.warning(told, capability)


def check_memory(compiled: jax.stages.Compiled) -> None:
    """`check_fits` of what a program needs."""
    if used := compiled.memory_analysis():
        check_fits(used.output_size_in_bytes + used.temp_size_in_bytes - used.alias_size_in_bytes)


def check_fits(needed: int) -> None:
    """Raises MemoryError where a CPU needs more bytes than are free.

    XLA would wait for ever, or Linux end the process without a word. Accelerators tell themselves.
    """
    if jax.default_backend() == "cpu" and needed > (free := free_memory()):
        raise MemoryError(f"{needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} are free")


def reproducibility_facts() -> dict[str, Any]:
    """What decides the last bits of a run, besides its config, its data and this code."""
    device, here = jax.devices()[0], describe()
    facts = {
        **{name: here["versions"][name] for name in ("jaxlib", "jax", "flax", "optax", "numpy")},
        "git_commit": here["git_commit"],
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "devices": f"{jax.device_count()} x {device.platform} {_cpu_model() or device.device_kind}",
        "prng": jax.config.jax_default_prng_impl,  # type: ignore[attr-defined]
    }
    # XLA has a thread for each core, whatever share of their time a container may use.
    return facts | ({"cpu_cores": _threads()} if device.platform == "cpu" else {})


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
        told = "the run goes on, but its last bits may differ from those of one never stopped: %s"
        logging.warning(told, "; ".join(other))


def accelerators() -> list[str]:
    """Paths of the GPUs and TPUs that are there, whether JAX can use them or not."""
    return [path for kind in ACCELERATORS for path in glob.glob(kind)]


def cores() -> list[int]:
    """Their numbers, of those that this process may use; see `cpu_cores`."""
    there = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(cpu_cores())
    return sorted(there)[: cpu_cores()]


def cpu_cores() -> int:
    """Those that this process may use, where the system tells (Linux, cgroup v2), else all."""
    shares = [text.split() for text in _of_cgroups("cpu.max")]
    allowed = [int(quota) / int(period) for quota, period in shares if quota != "max"]
    return max(1, round(min([_threads(), *allowed])))


def free_memory() -> int:
    """Bytes that this process may still take, of the machine and of its container (cgroup v2)."""
    free = [psutil.virtual_memory().available]
    files = ("memory.max", "memory.current", "memory.stat")
    for limit, used, stat in zip(*map(_of_cgroups, files)):
        if limit.strip() != "max":
            cached = sum(map(int, re.findall(r"^(?:in)?active_file (\d+)", stat, re.M)))
            free.append(max(0, int(limit) - int(used) + cached))  # Linux drops cached files
    return min(free)


def _of_cgroups(name: str) -> list[str]:
    """The texts of a file of cgroup v2, for this process's group and those around it."""
    own = re.search("^0::/(.*)", OWN_CGROUP.read_text(), re.M) if OWN_CGROUP.exists() else None
    group = CGROUPS / own[1] if own else Path()
    paths = [path / name for path in (group, *group.parents) if path.is_relative_to(CGROUPS)]
    return [path.read_text() for path in paths if path.exists()]


def _threads() -> int:
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


def trained_by(before: dict[str, Any] | None = None) -> dict[str, Any]:
    """`describe()` of a run's first session, and "git_commits": those of all its sessions."""
    saved, commit = before or describe(), describe()["git_commit"]
    commits = saved.get("git_commits", [saved.get("git_commit")])
    return saved | {"git_commits": list(dict.fromkeys([*commits, commit]))}


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
