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

import jax
import pytest

from tests.helpers import ROOT

jax.config.update("jax_num_cpu_devices", 4)


@pytest.fixture(autouse=True)
def _no_leftover_state(monkeypatch):
    monkeypatch.chdir(ROOT)
