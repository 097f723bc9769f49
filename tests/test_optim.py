"""Schedules reach what they promise; optimisers move the right parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imgcls.optim import (
    ITERATIONS,
    NEWTON_SCHULZ,
    OPTIMIZERS,
    SCHEDULES,
    create_optimizer,
    create_schedule,
    orthogonalize,
)

PARAMS = {
    "conv": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)},
    "dense": {"kernel": jnp.ones((4, 5)), "scale": jnp.ones(5)},
}
ZEROS = {k: {n: jnp.zeros_like(p) for n, p in v.items()} for k, v in PARAMS.items()}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_warm_up_to_the_peak_and_end_where_they_should(name):
    schedule = create_schedule(name, learning_rate=2.0, warmup_steps=10, total_steps=110)
    assert schedule(0) == 0 and schedule(5) == pytest.approx(1) and schedule(10) == pytest.approx(2)
    end = {"constant": 2.0, "cosine": 0.0, "linear": 0.0, "step": 0.02}[name]
    assert schedule(110) == pytest.approx(end, abs=1e-6)
    values = [float(schedule(i)) for i in range(10, 111)]
    assert values == sorted(values, reverse=True)


def test_a_probe_has_a_schedule_of_its_own_before_the_other_begins():
    how = {"learning_rate": 2.0, "warmup_steps": 10}
    probed = create_schedule("cosine", **how, total_steps=110, probe=(0.3, 20))
    after, first = create_schedule("cosine", **how, total_steps=90), SCHEDULES["cosine"](0.3, 20)
    expected = [*map(first, range(20)), *map(after, range(91))]
    np.testing.assert_allclose([*map(probed, range(111))], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "how, slower", [({"backbone_ratio": 0.1}, 0.1), ({"layer_decay": 0.5}, 0.25)]
)
def test_what_is_below_the_last_layer_learns_at_a_rate_of_its_own(how, slower):
    params = {"blocks_0": PARAMS["conv"], "blocks_1": PARAMS["conv"], "head": PARAMS["dense"]}
    plain, scaled = (
        tx.update(params, tx.init(params), params)[0]
        for own in ({}, how)
        for tx in [create_optimizer("sgd", optax.constant_schedule(0.1), learning_rate=0.1, **own)]
    )
    np.testing.assert_array_equal(scaled["head"]["kernel"], plain["head"]["kernel"])
    expected = slower * plain["blocks_0"]["kernel"]
    np.testing.assert_allclose(scaled["blocks_0"]["kernel"], expected, rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_shrinks_kernels_and_nothing_else(name):
    tx = create_optimizer(
        name,
        optax.constant_schedule(0.1),
        learning_rate=0.1,
        weight_decay=0.5,
    )
    updates, _ = tx.update(ZEROS, tx.init(PARAMS), PARAMS)
    new = optax.apply_updates(PARAMS, updates)
    # SGD's decay goes through Nesterov's momentum, and Muon gives dense layers a rate of their own.
    shrinks = {"sgd": (0.095, 0.095), "muon": (0.05, 0.005)}.get(name, (0.05, 0.05))
    for layer, by in zip(("conv", "dense"), shrinks):
        np.testing.assert_allclose(new[layer]["kernel"], 1 - by, rtol=1e-6)
    assert (new["conv"]["bias"] == 1).all() and (new["dense"]["scale"] == 1).all()


def test_the_step_schedule_divides_by_ten_after_half_and_after_three_quarters():
    schedule = create_schedule("step", learning_rate=1.0, warmup_steps=0, total_steps=80)
    values = [float(schedule(step)) for step in (0, 39, 41, 59, 61, 80)]
    np.testing.assert_allclose(values, [1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_is_the_optimizer_s_own(name):
    def second(momentum):
        tx = create_optimizer(
            name, optax.constant_schedule(0.1), learning_rate=0.1, momentum=momentum
        )
        _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
        grads = jax.tree.map(lambda p: -0.05 * p.at[..., 0].set(3.0), PARAMS)
        return tx.update(grads, state, PARAMS)[0]["conv"]["kernel"]

    assert not np.allclose(second(0.3), second(0.9), rtol=1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_descends(name):
    own = {"muon_sgd": {"dense_learning_rate": 0.02, "bias_learning_rate": 0.02}}.get(name, {})
    tx = create_optimizer(
        name,
        optax.constant_schedule(0.02),
        learning_rate=0.02,
        clip_norm=1.0,
        **own,
    )
    params, state = PARAMS, tx.init(PARAMS)
    size = lambda params: float(optax.tree.norm(params))
    for _ in range(20):
        updates, state = tx.update(params, state, params)  # the gradient of half the squared norm
        params = optax.apply_updates(params, updates)
    assert size(params) < 0.95 * size(PARAMS)


def test_clipping_bounds_the_update():
    tx = create_optimizer(
        "sgd",
        optax.constant_schedule(1.0),
        learning_rate=1.0,
        momentum=0.0,
        weight_decay=0.0,
        clip_norm=0.5,
    )
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.5)


def test_muon_sgd_has_a_learning_rate_of_its_own_for_dense_layers_and_for_biases():
    tx = create_optimizer(
        "muon_sgd",
        optax.constant_schedule(0.5),
        learning_rate=0.5,
        dense_learning_rate=0.05,
        bias_learning_rate=5.0,
    )
    params = {
        "block": {"head": {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)}},
        "Dense_like_norm": {"bias": jnp.ones(4)},
    }
    updates, _ = tx.update(params, tx.init(params), params)
    nesterov = 1 + 0.85
    assert jnp.allclose(updates["block"]["head"]["kernel"], -0.5 * 0.1 * nesterov)
    assert jnp.allclose(updates["block"]["head"]["bias"], -0.5 * 0.1 * nesterov)
    assert jnp.allclose(updates["Dense_like_norm"]["bias"], -0.5 * 10 * nesterov)


@pytest.mark.parametrize("shape", [(3, 3, 4, 16), (3, 3, 32, 16), (1, 1, 4, 40)])
@pytest.mark.parametrize("rank", [2, None])
def test_muon_iterates_as_newton_and_schulz(shape, rank):
    rng = np.random.default_rng(0)
    rows = int(np.prod(shape[:3]))
    u, s, v = np.linalg.svd(rng.normal(size=(rows, shape[3])), full_matrices=False)
    s = np.geomspace(1, 1e-4, len(s)) * (np.arange(len(s)) < (rank or len(s)))
    kernel = ((u * s) @ v).reshape(shape)
    a, b, c = NEWTON_SCHULZ
    s = s / np.linalg.norm(s)
    for _ in range(ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    expected = ((u * s) @ v).reshape(shape)
    np.testing.assert_allclose(orthogonalize(jnp.float32(kernel)), expected, atol=1e-5)


def test_muon_orthogonalises_the_nesterov_momentum_of_the_gradients():
    tx = create_optimizer("muon", optax.constant_schedule(0.1), learning_rate=0.1, momentum=0.8)
    first, second = np.random.default_rng(0).normal(size=(2, 3, 3, 2, 4)).astype(np.float32)
    params = {"kernel": jnp.zeros(first.shape)}
    _, state = tx.update({"kernel": jnp.asarray(first)}, tx.init(params), params)
    updates, _ = tx.update({"kernel": jnp.asarray(second)}, state, params)
    trace = 0.8 * first + second
    expected = -0.1 * orthogonalize(jnp.asarray(0.8 * trace + second))
    np.testing.assert_allclose(updates["kernel"], expected, atol=1e-6)


def test_muon_leaves_what_is_no_kernel_of_a_convolution_to_adamw_of_a_shorter_memory():
    own = {"momentum": 0.8, "adam_learning_rate": 0.02, "weight_decay": 0.1}
    tx = create_optimizer("muon", optax.constant_schedule(0.5), learning_rate=0.5, **own)
    both, dense = (tx, optax.adamw(0.02, b2=0.99, weight_decay=0.1)), {"kernel": jnp.ones((4, 5))}
    states = [optimizer.init(dense) for optimizer in both]
    for scale in (1.0, -0.3):
        gradient = {"kernel": scale * dense["kernel"]}
        updates, states = zip(*(o.update(gradient, s, dense) for o, s in zip(both, states)))
        np.testing.assert_allclose(*(update["kernel"] for update in updates), rtol=1e-5)


def test_muon_leaves_a_kernel_without_a_gradient_alone():
    assert (orthogonalize(jnp.zeros((3, 3, 2, 4))) == 0).all()


def test_muon_makes_the_update_of_a_kernel_nearly_orthogonal():
    tx = create_optimizer(
        "muon",
        optax.constant_schedule(1.0),
        learning_rate=1.0,
    )
    params = {"kernel": jnp.zeros((3, 3, 2, 4))}
    u, _, v = np.linalg.svd(np.random.default_rng(0).normal(size=(18, 4)), full_matrices=False)
    gradient = (u * [1.0, 2.0, 5.0, 10.0]) @ v
    grads = {"kernel": jnp.asarray(gradient.reshape(3, 3, 2, 4), jnp.float32)}
    updates, _ = tx.update(grads, tx.init(params), params)
    singular = np.linalg.svd(np.asarray(updates["kernel"]).reshape(18, 4), compute_uv=False)
    assert singular.max() < 2 * singular.min()
