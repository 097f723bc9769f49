"""What was saved is what is restored, or the user is told; never something else."""

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imgcls.errors import CheckpointError, UserError
from imgcls.experiment import Experiment
from imgcls.parallel import make_mesh, replicated, split_by_example
from imgcls.run.checkpoint import Checkpoints
from tests.helpers import ROOT, small_config

STATE = {
    "kernel": jnp.arange(2000.0).reshape(40, 50),
    "step": jnp.int32(7),
    "half": jnp.ones(3, "bfloat16"),
}
NAN = float("nan")


def target(state=STATE, sharding=None):
    sharding = sharding or replicated(make_mesh())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def saved(directory, tops=(0.5,), **meta):
    """The checkpoints of steps 1, 2, ..., with these validation top-1s or dicts of metrics."""
    checkpoints = Checkpoints(directory)
    for step, metrics in enumerate(tops, start=1):
        checkpoints.save(step, STATE | {"step": jnp.int32(step)}, meta)
        if metrics is not None:
            metrics = metrics if isinstance(metrics, dict) else {"top1": metrics, "loss": 1.0}
            checkpoints.record(step, metrics)
    checkpoints.close()
    return Checkpoints(directory)


def largest_file(folder):
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def contents(folder):
    return {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_state_and_meta_come_back_bit_for_bit(tmp_path):
    checkpoints = saved(tmp_path, sums={"loss": 0.1 + 0.2}, names=["a"])
    state, meta = checkpoints.restore_latest(target())
    assert meta == {"sums": {"loss": 0.1 + 0.2}, "names": ["a"]}
    expected = STATE | {"step": jnp.int32(1)}
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert {k: v.dtype for k, v in state.items()} == {k: v.dtype for k, v in expected.items()}


PLACES = {
    "whole on one": lambda: replicated(Mesh(jax.devices()[:1], "data")),
    "whole on four": lambda: replicated(make_mesh()),
    "rows on four": lambda: split_by_example(make_mesh()),
    "columns on two": lambda: NamedSharding(
        Mesh(np.reshape(jax.devices(), (2, 2)), ("a", "b")), PartitionSpec(None, "a")
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_split_or_whole_it_is_restored_wherever_it_shall_live(place, tmp_path):
    state = {"kernel": jax.device_put(STATE["kernel"], PLACES[place]())}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    for sharding in (make() for make in PLACES.values()):
        found = checkpoints.restore_latest(target(state, sharding))[0]["kernel"]
        assert found.sharding == sharding
        np.testing.assert_array_equal(found, STATE["kernel"])
    damage(tmp_path / "1", flip_a_bit)
    with pytest.raises(CheckpointError, match="kernel are not those saved: .*/1 is damaged"):
        checkpoints.restore("1", target(state))


@pytest.mark.parametrize("place", PLACES)
def test_the_state_may_be_donated_while_it_is_being_saved(place, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = jax.device_put(jnp.zeros((1000, 1000)), PLACES[place]())
    spoil = jax.jit(lambda x: x + 1, donate_argnums=0)
    for step in range(1, 4):
        checkpoints.save(step, {"x": state}, {})
        state = spoil(state)
        checkpoints.wait()
        found, _ = checkpoints.restore("latest", target({"x": state}))
        assert (found["x"] == step - 1).all()


@pytest.mark.parametrize(
    "tops, best",
    [
        ([0.1, 0.9, 0.3, 0.2, 0.1], 2),
        ([0.5, NAN, NAN, NAN], 1),
        ([None, 0.3, None, None], 2),
        ([0.1, 0.9, 0.9, 0.1, 0.1], 3),
        ([{"loss": 2.0}, {"loss": 0.5}, {"loss": NAN}, {"loss": 0.6}], 2),
    ],
)
def test_the_latest_and_the_best_are_kept(tmp_path, tops, best):
    checkpoints = saved(tmp_path, tops)
    assert checkpoints.find("latest") == len(tops)
    assert checkpoints.find("best") == best
    assert checkpoints.steps() == sorted({best, len(tops) - 1, len(tops)})
    json.loads((tmp_path / "validation.json").read_text(), parse_constant=pytest.fail)


def test_what_brings_no_better_score_is_counted_from_the_first_best_one(tmp_path):
    assert Checkpoints(tmp_path / "new").since_best() == (0, 0)
    checkpoints = saved(tmp_path, [0.2, 0.5, 0.5])
    assert checkpoints.since_best() == (2, 1)
    checkpoints.record(4, {})
    assert checkpoints.since_best() == (2, 1), "a step that cannot be the best counts for none"
    checkpoints.record(5, {"top1": 0.4, "loss": NAN})
    assert checkpoints.since_best() == (2, 2)
    checkpoints.record(6, {"top1": 0.6})
    assert checkpoints.since_best() == (6, 0)


def test_scores_past_the_restored_step_are_dropped(tmp_path):
    checkpoints = saved(tmp_path, [0.1, 0.2, 0.9])
    checkpoints.record(4, {"top1": 0.3})  # killed before its save was whole
    damage(tmp_path / "3", flip_a_bit)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.validated_step == 4
    checkpoints.restore_latest(target())
    assert Checkpoints(tmp_path).validated_step == checkpoints.validated_step == 2
    before = contents(tmp_path)
    Checkpoints(tmp_path).restore_latest(target())
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "garbage", [b"", b"\0" * 50, b'{"1": {"top1": 0', b"[1]", b'{"1": 2}', b'{"1": {"top1": "a"}}']
)
def test_scores_that_cannot_be_read_count_as_none_with_a_warning(tmp_path, garbage, caplog):
    saved(tmp_path, [0.5, 0.4])
    (tmp_path / "validation.json").write_bytes(garbage)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore_latest(target())[0]["step"] == 2
    assert checkpoints.validated_step == 0 and len(caplog.records) == 1
    checkpoints.record(2, {"top1": 0.4})
    assert Checkpoints(tmp_path).find("best") == 2


def test_scores_without_a_checkpoint_are_those_of_a_run_that_never_was(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.record(2, {"top1": 0.5})  # killed before its first save was whole
    assert Checkpoints(tmp_path / "checkpoints").validated_step == 0


def test_scores_that_cannot_be_read_are_those_that_were_logged(tmp_path):
    checkpoints = saved(tmp_path / "checkpoints", [0.5, 0.4])
    rows = [
        {"step": s, "epoch": s, "split": split, "loss": None, "top1": t, "seconds": 3.0}
        for s, split, t in [(1, "validation", 0.5), (2, "train", 1.0), (2, "validation", 0.4)]
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "checkpoints/validation.json").write_bytes(b"")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert (checkpoints.find("best"), checkpoints.validated_step) == (1, 2)


def test_the_checkpoints_of_an_older_run_are_used(tmp_path):
    row = {"step": 1, "epoch": 1.0, "split": "validation", "top1": 0.5, "seconds": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row))
    tmp_path /= "checkpoints"
    saved(tmp_path, [0.5, 0.4], validated_step=1)
    (tmp_path / "validation.json").unlink()
    for step in (1, 2):
        path = tmp_path / f"{step}/meta/metadata"
        meta = json.loads(path.read_text())
        del meta["sha256"]
        for leaf in meta["leaves"].values():
            leaf["sha256"] = leaf["sha256"]["[]"]
        path.write_text(json.dumps(meta))
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.find("best") == 1
    assert checkpoints.restore_latest(target())[1] == {}
    assert checkpoints.validated_step == 1
    damage(tmp_path / "2", flip_a_bit)
    assert checkpoints.restore_latest(target())[0]["step"] == 1


def test_a_save_that_fails_leaves_what_is_there(tmp_path):
    checkpoints = saved(tmp_path, [None], first=True)
    with pytest.raises(CheckpointError, match="earlier checkpoints are intact"):
        checkpoints.save(1, STATE, {"first": False})  # the place is taken
    assert Checkpoints(tmp_path).restore_latest(target())[1] == {"first": True}


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage(checkpoint, how, part="state"):
    how(largest_file(checkpoint / part))


@pytest.mark.parametrize("part", ["state", "meta"])
@pytest.mark.parametrize("how", [cut, lambda path: path.unlink(), flip_a_bit])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(tmp_path, how, part, caplog):
    checkpoints = saved(tmp_path, [0.1, 0.2], text="x" * 2000)
    damage(tmp_path / "2", how, part)
    with pytest.raises(CheckpointError, match=r"/2 is damaged.*choose another of \[1, 2\]"):
        checkpoints.restore("2", target())
    state, _ = checkpoints.restore_latest(target())
    assert state["step"] == 1
    assert "2 is damaged" in caplog.text
    assert (tmp_path / "damaged-2").is_dir() and checkpoints.steps() == [1]


def test_where_the_best_is_damaged_the_best_of_the_others_is_used(tmp_path, caplog):
    checkpoints = saved(tmp_path, [0.9, 0.8, 0.7])
    damage(tmp_path / "1", cut)
    before = contents(tmp_path)
    assert Checkpoints(tmp_path, read_only=True).restore("best", target())[0]["step"] == 2
    assert contents(tmp_path) == before and "1 is damaged" in caplog.text
    assert checkpoints.restore("best", target())[0]["step"] == 2
    assert (tmp_path / "damaged-1").is_dir()
    damage(tmp_path / "2", cut, "meta")
    reader = Checkpoints(tmp_path, read_only=True)
    assert reader.read_meta("best") == reader.read_meta("3")
    for checkpoints in (reader, Checkpoints(tmp_path), Checkpoints(tmp_path)):  # later ones, too
        assert checkpoints.restore("best", target())[1] == {"in_place_of": 1}
    assert sorted(path.name for path in tmp_path.glob("[!v]*")) == ["3", "damaged-1", "damaged-2"]


def test_the_latest_that_was_used_in_the_place_of_a_damaged_one_says_so(tmp_path):
    saved(tmp_path, [0.9, 0.8])
    damage(tmp_path / "2", cut, "meta")
    reader = Checkpoints(tmp_path, read_only=True)
    reader.read_meta()
    assert reader.restore("latest", target())[1] == {"in_place_of": 2}
    assert Checkpoints(tmp_path).restore_latest(target())[1] == {}  # step 2 comes again


HOWS = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": cut,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "one bit": flip_a_bit,
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("how", HOWS)
def test_whichever_file_of_a_checkpoint_is_damaged_a_whole_one_is_used(tmp_path, how):
    saved(tmp_path / "before", [0.1, 0.2], note="kept").close()
    files = [path for path in (tmp_path / "before/2").rglob("*") if path.is_file()]
    assert len(files) > 10
    set_aside = 0
    for i, path in enumerate(files):
        directory = shutil.copytree(tmp_path / "before", tmp_path / str(i))
        HOWS[how](directory / path.relative_to(tmp_path / "before"))
        for checkpoints in (Checkpoints(directory, read_only=True), Checkpoints(directory)):
            assert checkpoints.read_meta()["note"] == "kept"
            state, meta = checkpoints.restore("latest", target())
            assert meta["note"] == "kept" and state["step"] in (1, 2)
            for name in ("kernel", "half"):
                np.testing.assert_array_equal(state[name], STATE[name])
        set_aside += (directory / "damaged-2").exists()
    assert set_aside > 2


@pytest.mark.parametrize("part", ["state", "meta"])
def test_what_cannot_be_read_now_is_not_damaged(tmp_path, part):
    checkpoints = saved(tmp_path, [0.1, 0.2])
    path = largest_file(tmp_path / "2" / part)
    content = path.read_bytes()
    path.unlink()
    path.symlink_to(path.name)  # opening it fails, for root too, and not because it is missing
    with pytest.raises(CheckpointError, match="/2 could not be read "):
        checkpoints.restore_latest(target())
    path.unlink()
    path.write_bytes(content)
    assert checkpoints.restore_latest(target())[0]["step"] == 2


def test_a_step_may_be_damaged_twice(tmp_path):
    saved(tmp_path, [0.1, 0.2]).close()
    for _ in range(2):
        damage(tmp_path / "2", lambda path: path.unlink())
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


def test_unfinished_saves_are_removed_and_other_things_left_alone(tmp_path):
    saved(tmp_path).close()
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "7.orbax-checkpoint-tmp").write_text("in the way of step 7")
    others = ["6", "007", "-1", "notes", "7.5", ".DS_Store", "my.orbax-checkpoint-tmp"]
    for name in others:
        (tmp_path / name).write_text("a stray file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "1/7.orbax-checkpoint-tmp").write_text("within a checkpoint")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [1] and not list(tmp_path.glob("[0-9]*tmp*"))
    checkpoints.save(7, STATE, {})
    checkpoints.wait()
    assert checkpoints.restore_latest(target())[0]["step"] == 7
    assert all((tmp_path / name).exists() for name in [*others, "folder"])
    with pytest.raises(CheckpointError, match="saving failed"):
        checkpoints.save(6, STATE, {})  # it takes no place of somebody's file


def test_nothing_good_left_is_an_error_and_never_a_fresh_start(tmp_path):
    checkpoints = saved(tmp_path, [0.1, 0.2])
    for step in ("1", "2"):
        damage(tmp_path / step, lambda path: path.unlink())
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        checkpoints.restore_latest(target())
    assert len(list(tmp_path.glob("damaged-*"))) == 2
    for _ in range(2):  # whenever it is started again
        with pytest.raises(CheckpointError, match="none of the checkpoints"):
            Checkpoints(tmp_path)


def test_results_without_a_checkpoint_are_no_place_for_a_fresh_start(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    for read_only in (False, True):
        with pytest.raises(CheckpointError, match="none of the checkpoints is there"):
            Checkpoints(tmp_path / "checkpoints", read_only=read_only).find("latest")


def test_links_lead_no_write_elsewhere(tmp_path):
    outside = tmp_path / "outside"
    saved(outside, [0.5]).close()
    before, directory = contents(outside), tmp_path / "checkpoints"
    directory.symlink_to(outside)
    with pytest.raises(UserError, match="it is a link: use another --workdir"):
        Checkpoints(directory)
    assert Checkpoints(directory, read_only=True).restore("latest", target())[0]["step"] == 1
    directory.unlink()
    directory.mkdir()
    for name in ("1", "2.orbax-checkpoint-tmp", "damaged-3", "1.orbax-checkpoint-tmp-unwanted"):
        (directory / name).symlink_to(outside / "1")
    (directory / "damaged-3").unlink()
    (directory / "validation.json").symlink_to(outside / "validation.json")
    checkpoints = Checkpoints(directory)
    assert checkpoints.steps() == []
    for step in range(2, 6):
        checkpoints.save(step, STATE, {})
        checkpoints.record(step, {"loss": 1.0 - step})
    checkpoints.wait()
    (directory / "damaged-5").symlink_to(outside / "1")
    damage(directory / "5", cut)
    checkpoints.restore_latest(target())
    assert checkpoints.steps() == [4] and (directory / "damaged-5/meta").exists()
    assert contents(outside) == before


def test_the_first_checkpoint_of_a_run_is_read_back_before_it_counts(tmp_path, monkeypatch):
    """On a file system that loses bytes, or under a name that orbax misreads."""
    finalize = ocp.StandardCheckpointHandler.finalize

    def and_lose(self, directory):
        finalize(self, directory)
        cut(largest_file(Path(directory)))

    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointHandler, "finalize", and_lose)
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, STATE, {})
        with pytest.raises(CheckpointError, match="saving failed .what was saved cannot be read"):
            checkpoints.save(2, STATE, {})
        assert checkpoints.steps() == []
    assert saved(tmp_path).steps() == [1]


@pytest.mark.parametrize("name", ["50%2e", "図 #1", "x.orbax-checkpoint-tmp-1"])
def test_a_directory_may_have_nearly_any_name(tmp_path, name):
    checkpoints = saved(tmp_path / name / "checkpoints", [0.1, 0.2])
    assert checkpoints.restore("best", target())[0]["step"] == 2
    damage(tmp_path / name / "checkpoints/2", cut)
    assert checkpoints.restore_latest(target())[0]["step"] == 1


@pytest.mark.parametrize("name", ["[best]", "lr*", "what?", "back\\slash", "logs:", "no\udcfftext"])
def test_but_for_names_that_orbax_would_misread(tmp_path, name):
    with pytest.raises(UserError, match="another --workdir"):
        Checkpoints(tmp_path / name / "checkpoints")
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(CheckpointError, match="no checkpoint 9: there are latest, 1$"):
        checkpoints.find("9")
    with pytest.raises(UserError, match="no checkpoint ²"):  # a digit, but no number
        checkpoints.find("²")


PROCESS = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.experimental.multihost_utils import sync_global_devices
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from imgcls.parallel import make_mesh, replicated, split_by_example
from imgcls.run.checkpoint import Checkpoints
x = np.arange(4000, dtype=np.float32).reshape(40, 100)
places = {"split": split_by_example(make_mesh()), "whole": replicated(make_mesh())}
state = {n: jax.make_array_from_callback(x.shape, s, lambda i: x[i]) for n, s in places.items()}
target = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for n, s in places.items()}
add_one = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
checkpoints = Checkpoints(Path(sys.argv[3]))
for step in 1, 2, 3:
    checkpoints.save(step, state, {})
    checkpoints.record(step, {"loss": float(step)})
    state = add_one(state)
checkpoints.close()
if jax.process_index() == 0:  # damages what only the other one reads
    files = Path(sys.argv[3]).glob("3/state/ocdbt.process_1/d/*")
    path = max(files, key=lambda path: path.stat().st_size)
    path.write_bytes(bytes(path.stat().st_size))
sync_global_devices("damaged")
both = checkpoints.restore_latest(target), checkpoints.restore("best", target)
for more, found in zip((1, 0), both):
    for shard in (shard for leaf in found[0].values() for shard in leaf.addressable_shards):
        np.testing.assert_array_equal(shard.data, x[shard.index] + more)
"""


def test_each_process_saves_and_reads_its_own_and_all_use_the_same_checkpoint(tmp_path):
    with socket.create_server(("localhost", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    command = lambda i: [sys.executable, "-c", PROCESS, address, str(i), tmp_path]
    pair = [
        subprocess.Popen(command(i), cwd=ROOT, stderr=subprocess.PIPE, text=True) for i in (0, 1)
    ]
    printed = [process.communicate(timeout=120)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], printed
    assert (tmp_path / "damaged-3").is_dir()
    x = np.arange(4000, dtype=np.float32).reshape(40, 100)
    found, _ = Checkpoints(tmp_path).restore("2", target({"split": x, "whole": x}))  # alone
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, x + 1), found)


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
        return Experiment(config, class_names=range(classes)).state_target()

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
