"""Rules of configs; every config that is shipped takes one step."""

import importlib
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imgcls import cpu, experiment
from imgcls.errors import UserError
from imgcls.losses import cross_entropy
from imgcls.models import resnet
from imgcls.run.workdir import write_json
from imgcls.state import create_state
from imgcls.steps import train_step
from tests.conftest import ROOT, small_config

RNG = jax.random.key(0)
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_valid_and_takes_a_finite_step(name, monkeypatch):
    monkeypatch.setitem(resnet.STAGES, 18, ((1, 1, 1, 1), False))
    config = importlib.import_module(f"configs.{name}").get_config()
    experiment.validate(config)
    config.model.dtype = "float32"
    for key, few in (("widths", 8), ("dense_widths", 8)):
        if key in config.model:
            config.model[key] = (few,) * len(config.model[key])
    model = experiment.build_model(config, 10)
    tx = experiment.build_optimizer(config, experiment.build_schedule(config, steps_per_epoch=9))
    shape = (2, *config.data.image_size, config.data.channels)
    create = jax.jit(partial(create_state, model=model, tx=tx, ema=config.optim.ema_decay > 0))
    state = create(jax.random.key(0), jnp.zeros(shape))
    batch = {
        "image": np.random.default_rng(0).integers(0, 256, shape, np.uint8),
        "label": np.array([3, 7], np.int32),
        "mask": np.ones(2, bool),
    }
    step = partial(
        train_step,
        model=model,
        tx=tx,
        preprocess=experiment.build_preprocess(config),
        augment=experiment.build_augment(config),
        loss_fn=partial(cross_entropy, label_smoothing=config.optim.label_smoothing),
        ema_decay=config.optim.ema_decay,
    )
    state, metrics = jax.jit(step)(state, batch, jax.random.key(1))
    assert metrics["bad"] == 0 and np.isfinite(metrics["loss"]) and state.step == 1


def test_a_field_has_one_type_in_all_configs():
    # A float where another config has an int: only one of the two takes --config.field=0.5.
    types = {}
    for name in CONFIGS:
        config = importlib.import_module(f"configs.{name}").get_config()
        for key, value in experiment.flatten(config).items():
            types.setdefault(key, {}).setdefault(type(value), []).append(name)
    assert {key: found for key, found in types.items() if len(found) > 1} == {}


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            {"optim__learning_rate": float("nan")},
            "config.optim.learning_rate=nan must be a number over 0",
        ),
        ({"train__batch_size": -8}, "config.train.batch_size=-8 must be a whole number"),
        ({"train__batch_size": 42}, "multiple of the 4 devices"),
        ({"data__image_size": (8, -8)}, "config.data.image_size"),
        ({"data__image_size": (8,)}, "config.data.image_size"),
        ({"data__mean": (0.1, 0.2)}, "one number for each of the channels"),
        ({"data__std": (0.0,)}, "config.data.std"),
        ({"data__std": ()}, "one number for each of the channels"),
        ({"data__mean": ("half",)}, "config.data.mean"),
        ({"data__mean": (np.float32(0.5),)}, "config.data.mean"),  # json has no such number
        ({"model__name": "cnm"}, "one of cnn, mlp, resnet, wide_resnet"),
        ({"model__widths": (8, 0)}, "config.model.widths"),
        ({"model__dropout_rate": 1.0}, "config.model.dropout_rate"),
        ({"optim__name": "sdg"}, "one of sgd, adamw, lion, muon"),
        ({"optim__warmup_epochs": 3.0}, "more than config.train.epochs"),
        ({"augment__flip_probability": 1.5}, "config.augment.flip_probability"),
        (
            {"augment__flip_probability": 0.5, "data__alternate_flip": True},
            "config.data.alternate_flip takes the place",
        ),
        ({"augment__rotate_degrees": -1.0}, "config.augment.rotate_degrees"),
        ({"data__validation": "", "eval__checkpoint": "best"}, "config.eval.checkpoint=best needs"),
        ({"seed": -1}, "config.seed=-1"),
    ],
)
def test_values_out_of_range_are_refused_by_name(overrides, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        experiment.validate(small_config(**overrides))


def test_a_missing_and_an_unknown_key_are_refused_by_name():
    config = small_config().copy_and_resolve_references()
    del config.optim.momentum
    with pytest.raises(UserError, match=r"config\.optim\.momentum is missing"):
        experiment.validate(config)
    config = small_config()
    config.optim.unlock()
    config.optim.momentun = 0.9
    with pytest.raises(UserError, match=r"momentun .* did you mean config\.optim\.momentum"):
        experiment.validate(config)
    config = small_config()
    config.augment.unlock()
    config.augment.rotate = 1.0
    with pytest.raises(UserError, match="rotate"):
        experiment.validate(config)


@pytest.mark.parametrize(
    "model, message",
    [
        ({"name": "resnet", "depth": 101}, "model.depth=101 must be one of 18, 34, 50"),
        ({"name": "resnet", "stem": "imagnet"}, "must be one of cifar, imagenet"),
        ({"name": "wide_resnet", "depth": 20}, "model.depth=20 must be 6 n + 4"),
        ({"name": "wide_resnet", "depth": 4}, "model.depth=4 must be 6 n + 4"),
    ],
)
def test_a_network_that_nobody_made_is_refused(model, message):
    config = small_config()
    common = {key: config.model[key] for key in ("dtype", "matmul_precision", "cpu_kernels")}
    fields = experiment._model_fields(model["name"])
    config.model = common | fields | {"name": model["name"]}
    experiment.validate(config)
    config.model.update(model)
    with pytest.raises(UserError, match=re.escape(message)):
        experiment.validate(config)


def test_without_an_augment_section_nothing_is_augmented():
    config = small_config()
    del config.augment
    experiment.validate(config)
    batch = {"image": np.arange(40 * 64, dtype=np.uint8).reshape(40, 8, 8, 1)}
    batch["label"] = np.zeros(40, np.int32)
    images = experiment.augmented_images(config, batch, 10)
    np.testing.assert_allclose(images, batch["image"] / 255, atol=1e-6)


def test_a_network_that_pools_more_often_than_the_image_allows_is_refused():
    with pytest.raises(UserError, match="halves the image 4 times"):
        experiment.build_model(small_config(model__widths=(4, 4, 4, 4)), 10)
    early = small_config(train__early_epochs=1.0, train__early_image_size=(1, 1))
    with pytest.raises(UserError, match=r"too often for config.train.early_image_size=\(1, 1\)"):
        experiment.build_model(early, 10)
    whitened = {"model__widths": (4, 4, 4), "model__whiten": True}  # 8x8 pixels
    with pytest.raises(UserError, match="halves the image 3 times"):
        experiment.build_model(small_config(**whitened), 10)
    experiment.build_model(small_config(**whitened, model__pad_whitening=True), 10)


def test_early_epochs_are_refused_where_they_cannot_be():
    with pytest.raises(UserError, match=r"train.early_epochs=3.0 is more than config.train.epochs"):
        experiment.validate(small_config(train__early_epochs=3.0))
    config = small_config(train__early_epochs=1.0)
    model = {key: config.model[key] for key in ("dtype", "matmul_precision", "cpu_kernels")}
    config.model = {"name": "mlp", "dense_widths": (8,), "dropout_rate": 0.0, **model}
    with pytest.raises(UserError, match="must be 0 for an mlp"):
        experiment.validate(config)


def test_only_the_early_steps_see_smaller_images():
    config = small_config(train__early_epochs=1.0, train__early_image_size=(6, 4))
    images, labels = jnp.ones((2, 8, 8, 1)), jnp.eye(2)
    for early, size in ((True, (6, 4)), (False, (8, 8))):
        augmented, _ = experiment.build_augment(config, early=early)(RNG, images, labels)
        assert augmented.shape == (2, *size, 1)


@pytest.mark.parametrize("split", ["train", "test"])
def test_validation_must_not_share_examples(split):
    overrides = {"data__validation": f"{split}[10:30]"}
    with pytest.raises(UserError, match="shares examples"):
        experiment.open_splits(small_config(**overrides), "train")


def test_a_config_survives_its_file(tmp_path):
    config = small_config()
    write_json(tmp_path / "config.json", experiment.to_json(config))
    loaded = experiment.load_config(tmp_path)
    assert experiment.flatten(loaded) == experiment.flatten(config)


def test_resuming_asks_for_the_same_config_but_for_what_is_harmless():
    saved = experiment.to_json(small_config())
    check = lambda **overrides: experiment.check_resumable(
        saved, small_config(**overrides), Path("runs/x")
    )
    check(data__dir="/elsewhere", train__log_every_steps=1, model__cpu_kernels="off")
    with pytest.raises(UserError, match=r"optim\.learning_rate=0\.5 \(was .*another --workdir"):
        check(optim__learning_rate=0.5)
    with pytest.raises(UserError, match="more epochs would be another run"):
        check(train__epochs=9)
    saved = experiment.to_json(small_config(optim__schedule="constant"))
    check(optim__schedule="constant", train__epochs=9)
    with pytest.raises(UserError, match="train.epochs=1"):
        check(optim__schedule="constant", train__epochs=1)


@pytest.mark.parametrize(
    "platform, instructions, dtype",
    [("cpu", True, "bfloat16"), ("cpu", False, "float32"), ("tpu", False, "bfloat16")],
)
def test_bfloat16_is_computed_where_the_device_has_it(platform, instructions, dtype, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: instructions)
    model = experiment.build_model(small_config(model__dtype="bfloat16"), 10)
    assert model.dtype == dtype


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_only_the_program_for_cpus_calls_our_kernels(platform, monkeypatch):
    backend_name = {"cuda": "gpu"}.get(platform, platform)
    monkeypatch.setattr(jax, "default_backend", lambda: backend_name)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    config = small_config()
    model = experiment.build_model(config, 10, ops=experiment.cpu_ops(config))
    tx, preprocess = optax.sgd(0.1), experiment.build_preprocess(config)
    step = partial(
        train_step,
        model=model,
        tx=tx,
        preprocess=preprocess,
        augment=experiment.build_augment(config),
        loss_fn=cross_entropy,
    )
    rng, images = jax.random.key(0), jnp.zeros((4, 8, 8, 1))
    state = jax.eval_shape(partial(create_state, model=model, tx=tx), rng, images)
    batch = {"image": images.astype(jnp.uint8), "label": jnp.zeros(4, jnp.int32)}
    lowered = jax.jit(step).trace(state, batch, rng).lower(lowering_platforms=(platform,))
    assert ("imgcls_conv" in lowered.as_text()) == (platform == "cpu")
