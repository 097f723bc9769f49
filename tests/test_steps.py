"""Properties of a training step and an evaluation step."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imgcls.models import MODELS
from imgcls.parallel import make_mesh, put_batch, replicated
from imgcls.state import create_state
from imgcls.steps import augment_batch, eval_step, normalize, predict_step, train_step
from imgcls.task import Classification

PREPROCESS = partial(normalize, mean=(0.5,), std=(0.25,))
PLAIN_CNN = {"widths": (8,), "norm": lambda **_: lambda x: x}  # neither BatchNorm nor dropout


def keep(rng, images, labels):
    return images, labels


def batch_of(size, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (size, 8, 8, 1), dtype=np.uint8),
        "label": rng.integers(0, 10, size).astype(np.int32),
        "mask": np.ones(size, bool),
    }


def setup(*, tx=None, model="cnn", ema=False, step_options=None, **fields):
    model = MODELS[model](num_classes=10, **fields)
    tx = tx or optax.sgd(0.1, momentum=0.9)
    state = create_state(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), model=model, tx=tx, ema=ema)
    options = {"augment": keep, "task": TASK} | (step_options or {})
    step = partial(train_step, model=model, tx=tx, preprocess=PREPROCESS, **options)
    return model, state, step


def close(a, b, **tolerance):
    jax.tree.map(partial(np.testing.assert_allclose, **tolerance), a, b)


def differ(a, b):
    return not jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


RNG = jax.random.key(7)
TASK = Classification()


def test_normalize_is_the_same_from_bytes_and_from_floats():
    images = batch_of(2)["image"]
    expected = (images / 255 - 0.5) / 0.25
    for given in (images, images.astype(np.float32) / 255):
        np.testing.assert_allclose(PREPROCESS(jnp.asarray(given)), expected, rtol=1e-5, atol=1e-6)


def test_only_images_marked_so_are_mirrored():
    batch = batch_of(4)
    marks = np.array([True, False, True, False])
    prepare = partial(augment_batch, RNG, augment=keep, task=TASK, num_classes=10)
    plain, _ = prepare(batch)
    images, _ = prepare(batch | {"mirrored": marks})
    np.testing.assert_array_equal(images[marks], plain[marks][:, :, ::-1])
    np.testing.assert_array_equal(images[~marks], plain[~marks])


@pytest.mark.parametrize(
    "model, fields",
    [pytest.param("cnn", {"widths": (8, 16)}, marks=pytest.mark.slow), ("mlp", {})],
)
def test_loss_goes_to_zero_on_one_batch(model, fields):
    _, state, step = setup(tx=optax.adam(1e-2), model=model, **fields)
    step = jax.jit(step)
    for _ in range(60):
        state, metrics = step(state, batch_of(20), RNG)
    assert metrics["loss"] / metrics["count"] < 0.01
    assert metrics["top1"] == metrics["count"] == 20


TINY_VIT = {"patch": 4, "width": 8, "depth": 2, "heads": 2, "drop_path_rate": 0.5}


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(PLAIN_CNN, id="plain"),
        pytest.param({"widths": (8,)}, id="batchnorm"),
        pytest.param({"model": "vit"} | TINY_VIT, id="vit", marks=pytest.mark.slow),
    ],
)
def test_one_device_equals_four(fields):
    _, state, step = setup(**fields)
    one = jax.jit(step)(state, batch_of(16), RNG)
    mesh = make_mesh()
    batch = batch_of(16)
    split = put_batch(lambda rows: {k: v[rows] for k, v in batch.items()}, np.arange(16), mesh)
    assert len(split["image"].sharding.device_set) == 4
    four = jax.jit(step)(jax.device_put(state, replicated(mesh)), split, RNG)
    close(one, four, rtol=1e-5, atol=1e-5)


def test_dropout_and_augmentation_are_the_same_on_one_device_and_on_four():
    noise = lambda rng, x, y: (x + 0.1 * jax.random.normal(rng, x.shape), y)
    _, state, step = setup(widths=(8,), dropout_rate=0.5, step_options={"augment": noise})
    one = jax.jit(step)(state, batch_of(16), RNG)
    mesh, batch = make_mesh(), batch_of(16)
    split = put_batch(lambda rows: {k: v[rows] for k, v in batch.items()}, np.arange(16), mesh)
    four = jax.jit(step)(jax.device_put(state, replicated(mesh)), split, RNG)
    close(one, four, rtol=1e-5, atol=1e-5)


def test_pmap_equals_jit_without_dropout_and_batchnorm():
    _, state, step = setup(**PLAIN_CNN)
    one = jax.jit(step)(state, batch_of(16), RNG)
    by_device = jax.tree.map(lambda x: x.reshape(4, 4, *x.shape[1:]), batch_of(16))
    copies = jax.tree.map(lambda x: jnp.stack([x] * 4), state)
    pmapped = jax.pmap(partial(step, axis_name="data"), axis_name="data", in_axes=(0, 0, None))
    four = jax.tree.map(lambda x: x[0], pmapped(copies, by_device, RNG))
    close(one, four, rtol=1e-5, atol=1e-5)


def test_pmap_keeps_devices_in_step_with_batchnorm_and_dropout():
    _, state, step = setup(widths=(8,), dropout_rate=0.5)
    by_device = jax.tree.map(lambda x: x.reshape(4, 4, *x.shape[1:]), batch_of(16))
    copies = jax.tree.map(lambda x: jnp.stack([x] * 4), state)
    pmapped = jax.pmap(partial(step, axis_name="data"), axis_name="data", in_axes=(0, 0, None))
    state, _ = pmapped(copies, by_device, RNG)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x[0], x[3]), state)


@pytest.mark.parametrize("unroll", [True, False])
def test_accumulation_equals_the_whole_batch(unroll):
    whole = setup(**PLAIN_CNN)
    parts = setup(**PLAIN_CNN, step_options={"accumulate_steps": 4, "unroll": unroll})
    results = [jax.jit(step)(state, batch_of(16), RNG) for _, state, step in (whole, parts)]
    close(*results, rtol=1e-4, atol=1e-6)


def test_dropout_differs_by_step_and_repeats_by_seed():
    _, state, step = setup(tx=optax.sgd(0.0), widths=(8,), dropout_rate=0.5)
    step = jax.jit(step)
    loss = lambda state, rng: float(step(state, batch_of(16), rng)[1]["loss"])
    first, second = loss(state, RNG), loss(state.replace(step=jnp.int32(1)), RNG)
    assert first != second
    assert first == loss(state, RNG)
    assert first != loss(state, jax.random.key(8))


def test_dropout_is_off_in_evaluation_and_statistics_do_not_move():
    model, state, _ = setup(widths=(8,), dropout_rate=0.5)
    evaluate = partial(eval_step, model=model, preprocess=PREPROCESS, task=TASK)
    twin = MODELS["cnn"](num_classes=10, widths=(8,), dropout_rate=0.0)
    a = evaluate(state, batch_of(16))
    smooth = Classification(label_smoothing=0.1)  # which is for training alone
    b = eval_step(state, batch_of(16), model=twin, preprocess=PREPROCESS, task=smooth)
    assert a["loss"] == b["loss"]


def test_training_moves_statistics_and_smooths_labels():
    _, state, step = setup(widths=(8,))
    smoothed = partial(step, task=Classification(label_smoothing=0.2))
    (after, plain), (_, metrics) = (jax.jit(s)(state, batch_of(16), RNG) for s in (step, smoothed))
    assert differ(state.batch_stats, after.batch_stats)
    assert metrics["loss"] != plain["loss"] and plain["bad"] == 0


def test_padded_evaluation_equals_unpadded():
    model, state, _ = setup(widths=(8,))
    evaluate = jax.jit(partial(eval_step, model=model, preprocess=PREPROCESS, task=TASK))
    batch = batch_of(13)
    padding = 3
    padded = {
        k: np.concatenate([v, np.zeros((padding, *v.shape[1:]), v.dtype)]) for k, v in batch.items()
    }
    close(evaluate(state, batch), evaluate(state, padded), rtol=1e-6)
    assert evaluate(state, padded)["count"] == 13


def test_evaluation_agrees_with_the_logits():
    model, state, _ = setup(widths=(8,))
    batch = batch_of(16)
    logits = predict_step(state, batch["image"], model=model, preprocess=PREPROCESS)
    sums = eval_step(state, batch, model=model, preprocess=PREPROCESS, task=TASK)
    log_probabilities = np.asarray(nn.log_softmax(logits))
    loss = -log_probabilities[np.arange(16), batch["label"]].sum()
    assert float(sums["loss"]) == pytest.approx(loss, rel=1e-5)
    assert sums["top1"] == (np.asarray(logits).argmax(-1) == batch["label"]).sum()


class Poison(Classification):
    """The loss alone is not finite where labels are smoothed, else its gradient alone."""

    def figures(self, logits, targets, *, train):
        figures = super().figures(logits, targets, train=train)
        steep = jnp.sqrt(logits - jax.lax.stop_gradient(logits)).sum(-1)  # 0, of infinite slope
        return figures | {"loss": figures["loss"] + (jnp.inf if self.label_smoothing else steep)}


@pytest.mark.parametrize(
    "poison",
    [
        {"augment": lambda rng, x, y: (x.at[0, 0, 0, 0].set(jnp.nan), y)},
        {"task": Poison(0.0)},
        {"task": Poison(0.1)},
    ],
    ids=["picture", "gradient", "loss"],
)
def test_a_step_that_is_not_finite_changes_nothing_but_the_step(poison):
    _, state, step = setup(widths=(8,), ema=True, step_options={"ema_decay": 0.9})
    state, _ = jax.jit(step)(state, batch_of(16), RNG)
    after, metrics = jax.jit(partial(step, **poison))(state, batch_of(16), RNG)
    assert metrics == {"loss": 0, "top1": 0, "count": 0, "bad": 1}
    assert after.step == state.step + 1
    close(after.replace(step=state.step), state, rtol=0, atol=0)


def test_the_average_is_what_evaluation_uses():
    model, state, step = setup(widths=(8,), ema=True, step_options={"ema_decay": 0.99})
    for _ in range(3):
        state, _ = jax.jit(step)(state, batch_of(16), RNG)
    assert differ(state.params, state.ema_params)
    images = batch_of(4)["image"]
    given = predict_step(state, images, model=model, preprocess=PREPROCESS)
    swapped = state.replace(params=state.ema_params, ema_params=None)
    expected = predict_step(swapped, images, model=model, preprocess=PREPROCESS)
    np.testing.assert_array_equal(given, expected)


def test_the_average_follows_its_definition():
    _, state, step = setup(widths=(8,), ema=True, step_options={"ema_decay": 0.2})
    expected, step = state.params, jax.jit(step)
    for i in range(4):
        state, _ = step(state, batch_of(16), RNG)
        decay = min(0.2, (1 + i) / (10 + i))
        expected = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, expected, state.params)
    close(state.ema_params, expected, rtol=1e-5, atol=1e-6)


def test_one_step_gives_the_numbers_it_always_gave():
    """A change here means that every run of everybody changes: say so where the change is made."""
    _, state, step = setup(widths=(8,), dropout_rate=0.1)
    state, metrics = jax.jit(step)(state, batch_of(16), RNG)
    state, metrics = jax.jit(step)(state, batch_of(16), RNG)
    golden = {"loss": 43.47617, "norm": 5.188601}
    found = {"loss": float(metrics["loss"]), "norm": float(optax.tree.norm(state.params))}
    assert found == pytest.approx(golden, rel=1e-4)
