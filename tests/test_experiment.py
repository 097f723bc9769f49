"""What an Experiment builds from a config."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imgcls import cpu, experiment
from imgcls.config import flatten, to_json
from imgcls.data.order import TrainOrder, epoch_order
from imgcls.data.sources import SOURCES
from imgcls.data.splits import Split
from imgcls.errors import UserError
from imgcls.experiment import Experiment, build_model, load_config
from imgcls.models import resnet
from imgcls.run import machine
from imgcls.run.workdir import write_json
from imgcls.task import balanced_weights
from tests.helpers import small_config
from tests.test_config import CONFIGS


def key_of(seed):
    return Experiment(small_config(seed=seed), class_names="ab").rng


def random_split(config, examples=4, classes=10):
    rng, shape = np.random.default_rng(0), (*config.data.image_size, config.data.channels)
    images = rng.integers(0, 256, (examples, *shape), np.uint8)
    labels = np.arange(examples, dtype=np.int32) % classes
    names = tuple(map(str, range(classes)))
    return Split("random", [images], labels, [str(i) for i in range(examples)], names)


QUICK = ("cifar10", "digits")  # what the others differ in is checked with them


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in CONFIGS]
)
def test_every_config_takes_a_finite_step(name, monkeypatch):
    monkeypatch.setitem(resnet.STAGES, 18, ((1, 1, 1, 1), False))
    config = importlib.import_module(f"configs.{name}").get_config()
    config.model.dtype = "float32"
    config.train.batch_size = 4
    config.data.image_size = config.data.image_size or (64, 64)
    for key in {"widths", "dense_widths"}.intersection(config.model.keys()):
        config.model[key] = (8,) * len(config.model[key])
    exp = Experiment(config, splits={"train": random_split(config)})
    state = exp.compile_init()()
    train_step = exp.compile_train_step(state, small=exp.small_steps > 0)
    state, metrics = train_step(state, exp.train_batch(0), exp.rng)
    assert metrics["bad"] == 0 and np.isfinite(metrics["loss"]) and state.step == 1


def test_without_augmentation_the_network_sees_the_images():
    config = small_config(**{f"augment__{key}": 0 for key in small_config().augment})
    exp = Experiment(config)
    np.testing.assert_allclose(
        exp.augmented_images(3), np.asarray(exp.train_batch(3)["image"]) / 255, atol=1e-6
    )


@pytest.mark.parametrize("step", [0, 5])
def test_the_images_shown_are_those_that_the_step_trains_on(step):
    """A network of one linear layer, whose gradient of the bias-free kernel tells its images."""
    config = small_config(train__small_epochs=1.0, train__small_image_size=(6, 4))
    exp = Experiment(config)
    small = step < exp.small_steps
    assert exp.augmented_images(step).shape == (40, *((6, 4) if small else (8, 8)), 1)
    seen = []

    class Watched(exp.model.__class__):
        def __call__(self, x, *, train):
            jax.debug.callback(lambda x: seen.append(x), x)
            return super().__call__(x, train=train)

    exp.model = Watched(**{k: getattr(exp.model, k) for k in exp.model.__dataclass_fields__})
    state = exp.compile_init()()
    state = state.replace(step=jax.device_put(jnp.int32(step), exp.everywhere))
    batch = exp.train_batch(step)
    exp.compile_train_step(state, small=small)(state, batch, exp.rng)[1]["loss"].block_until_ready()
    jax.effects_barrier()
    np.testing.assert_allclose(seen[-1], exp.preprocess(exp.augmented_images(step)), atol=1e-6)


def test_a_batch_that_the_devices_cannot_share_is_refused_with_the_nearest_that_they_can():
    with pytest.raises(
        UserError, match="batch_size=42 must be a multiple of the 4 .*nearest is 40"
    ):
        Experiment(small_config(train__batch_size=42)).total_steps  # noqa: B018
    config = small_config(train__batch_size=6)
    with pytest.raises(UserError, match="nearest is 4$"):  # because there are no 8 examples
        Experiment(config, splits={"train": random_split(config, examples=7)}).order  # noqa: B018
    # A trained model is used on any number of devices.
    assert Experiment(small_config(train__batch_size=42), class_names=("a", "b")).model


@pytest.mark.parametrize("split", ["train", "test"])
def test_validation_must_not_share_examples(split):
    overrides = {"data__validation": f"{split}[10:30]"}
    with pytest.raises(UserError, match="shares examples"):
        experiment.open_splits(small_config(**overrides), "train")


def compile_first_step(config, **split):
    exp = Experiment(config, splits={"train": random_split(config, **split)})
    exp.compile_train_step(exp.state_target(), small=exp.small_steps > 0)


def test_one_value_per_channel_is_refused_where_batch_norm_would_make_it_a_constant(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(experiment, "put_batch", lambda read, indices, _: read(indices))
    monkeypatch.setattr(experiment, "replicated", lambda _: None)
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda _: None)  # it is slow
    monkeypatch.setattr(machine, "check_memory", lambda _: None)
    one_pixel = {"model__widths": (4, 4, 4), "train__batch_size": 1, "model__cpu_kernels": "off"}
    small = {"train__small_epochs": 1.0, "train__small_image_size": (4, 4)}
    for refused in (
        one_pixel,
        one_pixel | {"train__batch_size": 4, "train__accumulate_steps": 4},
        one_pixel | {"model__widths": (4, 4)} | small,
    ):
        with pytest.raises(UserError, match="one value per channel"):
            compile_first_step(small_config(**refused))
    for fine in (
        one_pixel | {"train__batch_size": 2},
        one_pixel | {"model__widths": (4, 4)},
    ):
        compile_first_step(small_config(**fine))
    compile_first_step(small_config("mlp", train__batch_size=1))


@pytest.mark.parametrize("widths", [(10**5, 10**5), (10**6, 10**6), (10**6, 10**6, 10**6)])
def test_a_state_larger_than_the_memory_is_refused_before_xla_sees_it(widths, monkeypatch):
    exp = Experiment(small_config(model__widths=widths))
    monkeypatch.setattr(exp, "jit", lambda *_, **__: pytest.fail("it was compiled"))
    with pytest.raises(MemoryError, match="GiB are needed"):
        exp.compile_init()


def test_evaluation_takes_no_more_images_at_once_than_there_are():
    config = small_config(eval__batch_size=10**9)
    exp = Experiment(config, splits={"validation": random_split(config, examples=90)})
    (batch,) = exp.eval_batches("validation")
    assert batch["mask"].shape == (128,) and batch["mask"].sum() == 90
    config.eval.batch_size = 30
    assert [len(batch["mask"]) for batch in exp.eval_batches("validation")] == [32, 32, 32]


def test_steps_before_the_average_has_settled_cannot_be_the_best():
    def possible(epochs, **changed):
        config = small_config(train__epochs=epochs, train__batch_size=4, **changed)
        exp = Experiment(config, splits={"train": random_split(config, examples=20)})
        return [step for step in range(5, exp.total_steps + 1, 5) if exp.may_be_best(step)]

    assert possible(9, optim__ema_decay=0.99) == [30, 35, 40, 45]
    assert possible(2, optim__ema_decay=0.99) == [10], "there is always one"
    assert possible(3, optim__ema_decay=0.0) == [5, 10, 15]


def test_without_test_the_test_split_is_not_opened(monkeypatch):
    opened = SOURCES["digits"]

    class Sealed(type(opened(channels=1)["test"])):
        def __getitem__(self, index):
            raise UserError("the test split was opened")

    def sealed(**options):
        sources = opened(**options)
        sources["test"].__class__ = Sealed
        sources["test"].fingerprint = "sealed"  # not in the cache
        return sources

    monkeypatch.setitem(SOURCES, "digits", sealed)
    with pytest.raises(UserError, match="was opened"):
        Experiment(small_config()).splits  # noqa: B018
    assert Experiment(small_config(), test=False).splits.keys() == {"train", "validation"}


def test_a_config_survives_its_file(tmp_path):
    config = small_config()
    write_json(tmp_path / "config.json", to_json(config))
    assert flatten(load_config(tmp_path)) == flatten(config)


def test_balanced_weights_are_inverse_frequencies_of_the_training_split_with_mean_1():
    config = small_config(task__class_weights="balanced")
    exp = Experiment(config)
    labels = exp.splits["train"].labels
    counts = np.bincount(labels, minlength=10)
    assert exp.task.class_counts == tuple(counts)
    weights = np.asarray(balanced_weights(exp.task.class_counts))
    np.testing.assert_allclose(weights * counts, len(labels) / 10, rtol=1e-6)
    assert weights[labels].mean() == pytest.approx(1)


@pytest.mark.parametrize(
    "platform, instructions, dtype",
    [("cpu", True, "bfloat16"), ("cpu", False, "float32"), ("tpu", False, "bfloat16")],
)
def test_bfloat16_is_computed_where_the_device_has_it(platform, instructions, dtype, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: instructions)
    assert build_model(small_config(model__dtype="bfloat16"), 10).dtype == dtype


def test_building_a_model_of_another_precision_changes_no_other_program():
    exact = Experiment(small_config(model__matmul_precision="highest"), class_names=("a", "b"))
    assert exact.model and jax.config.jax_default_matmul_precision is None
    square = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    text = lambda jitted: jitted.lower(square).as_text().count("HIGHEST")
    assert text(exact.jit(lambda x: x @ x)) and not text(jax.jit(lambda x: x @ x))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_only_the_program_for_cpus_calls_our_kernels(platform, monkeypatch):
    backend_name = {"cuda": "gpu"}.get(platform, platform)
    monkeypatch.setattr(jax, "default_backend", lambda: backend_name)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    config = small_config()
    exp = Experiment(config, splits={"train": random_split(config, 40)})
    monkeypatch.undo()
    lowered = lower_train_step(exp, platform)
    assert ("imgcls_conv" in lowered.as_text()) == (platform == "cpu")


def lower_train_step(exp, platform):
    from imgcls.state import create_state
    from imgcls.steps import train_step

    images = jnp.zeros((4, 8, 8, 1))
    tx = optax.sgd(0.1)
    create = partial(create_state, model=exp.model, tx=tx)
    state = jax.eval_shape(create, jax.random.key(0), images)
    batch = {"image": images.astype(jnp.uint8), "label": jnp.zeros(4, jnp.int32)}
    step = partial(
        train_step,
        model=exp.model,
        tx=tx,
        preprocess=exp.preprocess,
        augment=exp.augmentation(small=False),
        task=exp.task,
    )
    traced = jax.jit(step).trace(state, batch, jax.random.key(0))
    return traced.lower(lowering_platforms=(platform,))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_seeds_of_32_bits_draw_what_they_drew_before_there_were_longer_ones(seed):
    expected = jax.random.key_data(jax.random.key(seed))
    assert jax.random.key_data(key_of(seed)).tolist() == expected.tolist()
    for epoch in (0, 3):
        order = np.random.default_rng([seed, epoch]).permutation(50)
        assert epoch_order(50, seed=seed, epoch=epoch).tolist() == order.tolist()
    mirrored = np.random.default_rng([seed, 0, 1]).integers(2, size=50) == 1
    order = TrainOrder(50, batch_size=5, seed=seed)
    assert order.mirrored(np.arange(50), 0).tolist() == mirrored.tolist()


def test_every_seed_gives_its_own_run():
    seeds = [1, 2, 2**32, 2**32 + 1, 2 * 2**32 + 1, 2**63 - 1]
    assert len({tuple(jax.random.key_data(key_of(seed)).tolist()) for seed in seeds}) == len(seeds)
    orders = {epoch_order(50, seed=s, epoch=e).tobytes() for s in seeds for e in range(3)}
    assert len(orders) == 3 * len(seeds)
    halves = {
        TrainOrder(50, batch_size=5, seed=seed).mirrored(np.arange(50), 0).tobytes()
        for seed in seeds
    }
    assert len(halves) == len(seeds)
