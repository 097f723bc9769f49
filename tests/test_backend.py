"""What the machine is told before training."""

import subprocess
import sys

import pytest

from imgcls import backend
from tests.conftest import ROOT, as_users

STEPS = """
import resource
from imgcls import backend
backend.start()
import jax, jax.numpy as jnp

def page_faults(step, x):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(step(x))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

x = jnp.ones(2**9)
step = jax.jit(lambda x: jnp.sort(jnp.outer(x, jnp.ones(2**14))).sum())
print([page_faults(step, x) for _ in range(5)][-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the GNU C library's malloc")
def test_the_memory_of_a_step_serves_the_next(monkeypatch):
    for name in [n for n in as_users() if n.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    command = [sys.executable, "-c", STEPS]
    output = subprocess.run(command, cwd=ROOT, env=as_users(), capture_output=True, check=True)
    assert int(output.stdout) < 1_000  # 32 MiB are sorted, 8,192 pages


def test_malloc_is_left_alone_where_the_user_has_tuned_it(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    monkeypatch.setattr(backend.ctypes, "CDLL", lambda *_: pytest.fail("malloc was told"))
    backend._keep_freed_memory()
