"""What JAX is told, and what is said of the machine."""

import os
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import filelock
import jax
import jax.numpy as jnp
import psutil
import pytest

from imgcls import cpu
from imgcls.errors import UserError
from imgcls.experiment import Experiment
from imgcls.run import machine
from imgcls.run.files import cache_folder
from tests.helpers import ROOT, small_config

compiler_options = machine.compiler_options.__wrapped__  # not what an earlier call found


@pytest.mark.skipif(jax.version.__version_info__ < (0, 8), reason="JAX 0.7 lacks an option")
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


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """The folder of compiled programs, which no earlier start has looked at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = ["compilation_cache_dir", "compilation_cache_max_size"]
    settings = [f"jax_{name}" for name in (*settings, "persistent_cache_min_compile_time_secs")]
    before = {name: getattr(jax.config, name) for name in settings}
    jax.config.update("jax_compilation_cache_dir", None)
    machine.keep_programs.cache_clear()
    yield cache_folder("xla")
    machine.keep_programs.cache_clear()
    for name, value in before.items():
        jax.config.update(name, value)


def put(folder, key, content, time=bytes(8)):
    for part, data in (("cache", content), ("atime", time)):
        if data is not None:
            (folder / f"{key}-{part}").write_bytes(data)


def test_what_a_kill_or_a_full_disk_left_of_a_program_is_removed(programs):
    whole = zlib.compress(os.urandom(3000))
    for key in ("first", "second"):
        put(programs, key, whole)
    put(programs, "untimed", whole, None)
    put(programs, "cut", whole[:1000])
    put(programs, "empty", b"")
    put(programs, "zeros", bytes(3000))
    put(programs, "only its time", None)
    keys = lambda: sorted(path.name for path in programs.glob("*-*"))
    kept = [f"{key}-{part}" for key in ("first", "second") for part in ("atime", "cache")]
    machine.start()
    assert keys() == kept and jax.config.jax_compilation_cache_dir == str(programs)
    # A program that was whole at an earlier start is looked at again once it was written to.
    put(programs, "second", whole[:1000], None)
    jax.config.update("jax_compilation_cache_dir", None)
    machine.keep_programs.cache_clear()
    machine.start()
    assert keys() == kept[:2]


def test_a_program_that_another_process_is_writing_is_left_alone(programs):
    whole = zlib.compress(os.urandom(3000))
    with ThreadPoolExecutor(1) as executor:
        with filelock.FileLock(programs / ".lockfile"):  # as JAX does
            put(programs, "key", whole[:1000], None)
            started = executor.submit(machine.start)
            with pytest.raises(TimeoutError):
                started.result(timeout=0.3)
            put(programs, "key", whole)
        started.result()
    assert (programs / "key-cache").read_bytes() == whole


def test_programs_that_cannot_be_kept_cost_one_warning(programs, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    machine.start()
    machine.start()
    (record,) = caplog.records
    assert "compiled programs are not kept in /proc/nowhere/imgcls/xla (" in record.message
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("place, mode", [("cache", 0o777), ("imgcls", 0o702), ("xla", 0o757)])
def test_a_cache_that_others_can_write_is_refused(programs, place, mode):
    (path,) = (path for path in (programs, *programs.parents[:2]) if path.name == place)
    path.chmod(mode)
    with pytest.raises(UserError, match=f"others can write to the cache {path}.*XDG_CACHE_HOME"):
        machine.start()
    path.chmod(mode | 0o1000)
    if place == "cache":  # sticky, as /tmp is: a folder of ours in it stays ours
        machine.start()
    else:
        with pytest.raises(UserError):
            machine.start()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("owner, mode", [(0, 0o775), (1, 0o700)])
def test_a_cache_of_a_group_or_of_another_is_refused(programs, owner, mode):
    os.chown(programs, owner, 5)
    programs.chmod(mode)
    with pytest.raises(UserError, match="others can write"):
        cache_folder("xla")
    programs.rename(programs.with_name("elsewhere"))
    programs.symlink_to("elsewhere")
    with pytest.raises(UserError, match="others can write"):
        cache_folder("xla")
    os.chown(programs.with_name("elsewhere"), 0, 0)
    programs.with_name("elsewhere").chmod(0o700)
    assert cache_folder("xla") == programs  # a link of the user's own
    os.chown(programs, 1, 5, follow_symlinks=False)
    with pytest.raises(UserError, match="others can write"):
        cache_folder("xla")


def test_a_new_cache_is_the_user_s_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = os.umask(0)
    try:
        folder = cache_folder("xla")
    finally:
        os.umask(before)
    assert [p.stat().st_mode & 0o777 for p in (folder, *folder.parents[:2])] == [0o700] * 3


def test_without_a_home_caches_are_temporary(tmp_path):
    code = (
        "import os, pwd; from imgcls.run.files import cache_folder\n"
        "def unknown(_): raise KeyError\n"
        "pwd.getpwuid = unknown\n"
        "print(cache_folder('xla'), cache_folder('datasets'), sep='\\n')"
    )
    environment = {
        key: os.environ[key] for key in os.environ if key not in ("HOME", "XDG_CACHE_HOME")
    }
    environment |= {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    first, second = result.stdout.splitlines()
    assert first.startswith(f"{tmp_path}/imgcls-") and second == first.replace("xla", "datasets")
    assert result.stderr.count("no home directory") == len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())  # it went with the process


@pytest.fixture
def container(tmp_path, monkeypatch):
    """Writes files of cgroup v2 in the folder of a group, this process's by default."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUP", tmp_path / "own")
    (tmp_path / "own").write_text("0::/outer/inner\n")

    def write(group="outer/inner", **contents):
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (tmp_path / group / name.replace("_", ".")).write_text(content)

    return write


def test_a_container_s_share_of_the_cores_is_what_counts(container, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    assert machine.cpu_cores() == 8
    for share, cores in (("max 100000", 8), ("250000 100000", 2), ("10000 100000", 1)):
        container(cpu_max=f"{share}\n")
        assert machine.cpu_cores() == cores
    container(cpu_max="max 100000\n")
    container("outer", cpu_max="300000 100000\n")
    assert machine.cpu_cores() == 3
    assert machine.reproducibility_facts()["cpu_cores"] == 8  # XLA's threads


def test_a_container_s_memory_is_what_counts(container):
    total = psutil.virtual_memory().total
    assert 0 < machine.free_memory() <= total
    stat = "anon 5000\nfile 900\ninactive_file 600\nactive_file 300\n"
    container(memory_max="max\n", memory_current="6000\n", memory_stat=stat)
    assert machine.free_memory() > 10**6
    container("outer", memory_max="10000\n", memory_current="7000\n", memory_stat=stat)
    assert machine.free_memory() == 10000 - 7000 + 900
    container(memory_max="5000\n", memory_current="6000\n", memory_stat=stat)
    assert machine.free_memory() == 0
    compiled = jax.jit(lambda: jnp.zeros(1000)).lower().compile()
    with pytest.raises(MemoryError, match="0.0 are free"):
        machine.check_memory(compiled)


def test_a_device_that_cannot_be_had_is_an_error_of_one_line(monkeypatch):
    def fails():
        raise RuntimeError("Unable to initialize backend 'tpu': it is in use by process 5\n...")

    monkeypatch.setattr(jax, "default_backend", fails)
    with pytest.raises(UserError, match=r"^JAX cannot start with .* process 5\): free the device"):
        machine.start()
