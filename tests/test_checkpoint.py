"""What was saved is what is restored, or the user is told; never something else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgcls.checkpoint import Checkpoints
from imgcls.errors import CheckpointError
from imgcls.sharding import make_mesh, replicated

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
        checkpoints.save(step, STATE | {"step": jnp.int32(step)}, meta, top1=top1)
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
