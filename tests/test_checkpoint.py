"""What was saved is what is restored, or the user is told; never something else."""

import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgcls import experiment
from imgcls.errors import CheckpointError
from imgcls.inference.classifier import state_target
from imgcls.parallel import make_mesh, replicated
from imgcls.run.checkpoint import Checkpoints
from tests.conftest import ROOT, small_config

STATE = {
    "kernel": jnp.arange(2000.0).reshape(40, 50),
    "step": jnp.int32(7),
    "half": jnp.ones(3, "bfloat16"),
}


def target(state=STATE, mesh=None):
    sharding = replicated(mesh or make_mesh())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def saved(directory, tops=(0.5,), **meta):
    checkpoints = Checkpoints(directory)
    for step, top1 in enumerate(tops, start=1):
        checkpoints.save(step, STATE | {"step": jnp.int32(step)}, meta)
        if top1 is not None:
            checkpoints.record(step, {"top1": top1})
    checkpoints.close()
    return Checkpoints(directory)


def largest_file(folder):
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def test_state_and_meta_come_back_bit_for_bit(tmp_path):
    checkpoints = saved(tmp_path, sums={"loss": 0.1 + 0.2}, names=["a"])
    state, meta = checkpoints.restore_latest(target())
    assert meta == {"sums": {"loss": 0.1 + 0.2}, "names": ["a"]}
    expected = STATE | {"step": jnp.int32(1)}
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert {k: v.dtype for k, v in state.items()} == {k: v.dtype for k, v in expected.items()}


def test_restores_onto_another_number_of_devices(tmp_path):
    checkpoints = saved(tmp_path)
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = jax.sharding.Mesh(devices, ("data",))
        state, _ = checkpoints.restore_latest(target(mesh=mesh))
        assert len(state["kernel"].sharding.device_set) == len(devices)
        np.testing.assert_array_equal(state["kernel"], STATE["kernel"])


def test_the_state_may_be_donated_while_it_is_being_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = jnp.zeros((1000, 1000))
    spoil = jax.jit(lambda x: x + 1, donate_argnums=0)
    for step in range(1, 4):
        checkpoints.save(step, {"x": state}, {})
        state = spoil(state)
        checkpoints.wait()
        found, _ = checkpoints.restore("latest", target({"x": state}))
        assert (found["x"] == step - 1).all()


@pytest.mark.parametrize(
    "tops, best",
    [([0.1, 0.9, 0.3, 0.2, 0.1], 2), ([0.5, float("nan"), float("nan"), float("nan")], 1)],
)
def test_the_latest_and_the_best_are_kept(tmp_path, tops, best):
    checkpoints = saved(tmp_path, tops)
    assert checkpoints.find("latest") == len(tops)
    assert checkpoints.find("best") == best
    assert set(checkpoints.steps()) == {best, len(tops) - 1, len(tops)}


def test_steps_that_were_not_validated_are_never_the_best(tmp_path):
    checkpoints = saved(tmp_path, [None, 0.3, None, None])
    assert checkpoints.find("best") == 2 and checkpoints.find("latest") == 4


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints = saved(tmp_path, [None])
    checkpoints.save(1, STATE, {"again": True}, top1=0.5)
    checkpoints.wait()
    assert checkpoints.restore_latest(target())[1] == {"again": True}
    assert checkpoints.find("best") == 1


def test_what_a_save_replaces_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, [None], first=True)

    def full(*args, **kwargs):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "save", full)
        with pytest.raises(CheckpointError, match="earlier checkpoints are intact"):
            checkpoints.save(1, STATE, {"first": False}, top1=0.5)
    again = Checkpoints(tmp_path)
    assert again.restore_latest(target())[1] == {"first": True}
    again.save(1, STATE, {"first": False}, top1=0.5)
    again.close()
    assert not list(tmp_path.glob("replaced*"))
    assert Checkpoints(tmp_path).restore_latest(target())[1] == {"first": False}


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.unlink(),
        flip_a_bit,
    ],
    ids=["truncated", "deleted", "one bit"],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(tmp_path, damage, caplog):
    checkpoints = saved(tmp_path, [0.1, 0.2])
    damage(largest_file(tmp_path / "2" / "state"))
    with pytest.raises(CheckpointError, match=r"/2 is damaged.*choose another of \[1, 2\]"):
        checkpoints.restore("2", target())
    state, _ = checkpoints.restore_latest(target())
    assert state["step"] == 1
    assert "2 is damaged" in caplog.text
    assert (tmp_path / "damaged-2").is_dir() and checkpoints.steps() == [1]


def test_a_step_may_be_damaged_twice(tmp_path):
    saved(tmp_path, [0.1, 0.2]).close()
    for _ in range(2):
        (largest_file(tmp_path / "2" / "state")).unlink()
        checkpoints = Checkpoints(tmp_path)
        assert checkpoints.restore_latest(target())[0]["step"] == 1
        checkpoints.save(2, STATE, {})
        checkpoints.close()
    assert checkpoints.steps() == [1, 2]


def test_an_empty_step_directory_is_set_aside(tmp_path, caplog):
    saved(tmp_path).close()
    (tmp_path / "5").mkdir()
    state, _ = Checkpoints(tmp_path).restore_latest(target())
    assert state["step"] == 1 and "5 is damaged or was never finished" in caplog.text


def test_unfinished_saves_are_removed(tmp_path):
    saved(tmp_path).close()
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    assert Checkpoints(tmp_path).steps() == [1]
    assert not list(tmp_path.glob("*tmp*"))


def test_nothing_good_left_is_an_error_and_never_a_fresh_start(tmp_path):
    checkpoints = saved(tmp_path, [0.1, 0.2])
    for step in ("1", "2"):
        largest_file(tmp_path / step / "state").unlink()
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        checkpoints.restore_latest(target())
    assert len(list(tmp_path.glob("damaged-*"))) == 2


@pytest.mark.parametrize(
    "other, message",
    [
        (
            {"kernel": jnp.ones((40, 51))},
            r"kernel was saved as float32\[40, 50\], expected is float32\[40, 51\]",
        ),
        ({"kernel": jnp.ones((40, 50), jnp.int32)}, r"expected is int32\[40, 50\]"),
        ({"bias": jnp.ones(3)}, "bias was saved as nothing"),
    ],
)
def test_another_model_is_refused_by_the_name_of_the_leaf(tmp_path, other, message):
    checkpoints = saved(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.restore_latest(target(STATE | other))
    assert checkpoints.steps() == [1]  # it is not damaged: nothing was moved


def test_what_cannot_be_found_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        Checkpoints(tmp_path).find("latest")
    checkpoints = saved(tmp_path, [None])
    with pytest.raises(CheckpointError, match="no checkpoint was validated"):
        checkpoints.find("best")
    with pytest.raises(CheckpointError, match=r"no checkpoint 9: there are \[1\]"):
        checkpoints.find("9")
    with pytest.raises(CheckpointError, match="no checkpoint ²"):  # a digit, but no number
        checkpoints.find("²")


VARIANTS = {
    "classes": ({}, 11, r"params.Dense_1.bias was saved as float32\[10\], expected is \w+\[11\]"),
    "widths": ({"model__dense_widths": (17,)}, 10, r"saved as float32\[16\], expected .*\[17\]"),
    "average": ({"optim__ema_decay": 0.0}, 10, r"ema_params.* expected is nothing"),
    "optimizer": ({"optim__name": "sgd"}, 10, r"opt_state.* expected is nothing"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_state_of_another_model_is_refused(variant, tmp_path):
    def state_of(classes=10, **changed):
        config = small_config(**changed)
        return state_target(config, experiment.build_model(config, classes))

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state_of()), {})
    checkpoints.wait()
    checkpoints.restore_latest(state_of())
    changed, classes, message = VARIANTS[variant]
    for restore in (checkpoints.restore_latest, lambda target: checkpoints.restore("1", target)):
        with pytest.raises(CheckpointError, match=message) as error:
            restore(state_of(classes, **changed))
        assert error.value.exit_code == 4


SAVER = """
import sys
from pathlib import Path
import numpy as np
from imgcls.run.checkpoint import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]))
for step in range((checkpoints.steps() or [0])[-1] + 1, 10**6):
    checkpoints.save(step, {"x": np.random.default_rng(step).random(10**7, np.float32)}, {})
"""


def kill_while_saving(directory, kills):
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", SAVER, directory], cwd=ROOT)
        newest = lambda: max([int(p.name) for p in directory.glob("*") if p.name.isdigit()] + [0])
        before = newest()
        while process.poll() is None:
            time.sleep(0.002)
            if newest() > before and list(directory.glob("*-tmp*/**/d/*")):
                process.kill()  # one save is done, and a file of the next one has begun
                break
        process.wait()
        assert list(directory.glob("*.orbax-checkpoint-tmp*")), "it was not killed while writing"
        step = newest()
        checkpoints = Checkpoints(directory)
        assert not list(directory.glob("*tmp*"))
        state, _ = checkpoints.restore_latest(target({"x": np.zeros(10**7, np.float32)}))
        np.testing.assert_array_equal(
            state["x"], np.random.default_rng(step).random(10**7, np.float32)
        )
        assert not list(directory.glob("damaged*"))
        checkpoints.close()


def test_killed_while_it_is_being_written_the_one_before_is_used(tmp_path):
    kill_while_saving(tmp_path, kills=2)


@pytest.mark.slow
def test_killed_ten_times_while_it_is_being_written(tmp_path):
    kill_while_saving(tmp_path, kills=10)
