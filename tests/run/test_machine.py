"""What JAX is told, and what is said of the machine."""

import jax
import jax.numpy as jnp
import pytest

from imgcls import cpu
from imgcls.experiment import Experiment
from imgcls.run import machine
from tests.helpers import small_config

compiler_options = machine.compiler_options.__wrapped__  # not what an earlier call found


@pytest.mark.parametrize("once", [False, True])
def test_a_cpu_compiles_with_our_options_unless_the_user_names_one(once, monkeypatch):
    options = machine.QUICK_TO_COMPILE if once else machine.CPU_OPTIONS
    monkeypatch.delenv("XLA_FLAGS")
    assert compiler_options(once=once) == options
    assert jax.jit(jnp.negative, compiler_options=options)(2.0) == -2
    (name,) = options
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=whatever")
    assert compiler_options(once=once) is None
    assert compiler_options(once=not once) is not None


def test_another_backend_is_told_nothing(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiler_options() is None


def test_a_jaxlib_that_does_not_know_an_option_goes_without(monkeypatch):
    monkeypatch.setattr(machine, "CPU_OPTIONS", {"xla_cpu_no_such_option": "1"})
    assert compiler_options() is None


@pytest.mark.parametrize("platform, devices", [("gpu", 1), ("tpu", 2), ("cpu", 4)])
def test_one_line_says_why_convolutions_are_not_onednns(platform, devices, monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    caplog.set_level("INFO")
    assert cpu.ops("float32") == {}
    (record,) = caplog.records
    reason = platform if platform != "cpu" else devices
    assert record.message.startswith("convolutions run on plain XLA: ")
    assert record.message.endswith(f", not for {reason}")
    caplog.clear()
    assert Experiment(small_config(model__cpu_kernels="off"), class_names="ab").ops == {}
    assert not caplog.records  # it was asked for
