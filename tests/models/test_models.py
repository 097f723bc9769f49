"""Every model: shapes, dtypes, parameter counts that the papers state."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from imgcls.models import MODELS
from imgcls.models.cnn import LAYOUT, partial_identity, whitening_filters
from imgcls.state import count_parameters


def shapes_of(name, size, channels=3, classes=10, **fields):
    model = MODELS[name](num_classes=classes, **fields)
    images = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    init = lambda x: model.init(jax.random.key(0), x, train=False)
    variables = jax.eval_shape(init, images)
    logits = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, images)
    return variables, logits


CASES = [
    ("cnn", 8, {"widths": (8, 16)}),
    ("cnn", 32, {}),
    ("cnn", 33, {"dense_widths": (7,), "convs_per_block": 3}),
    ("cnn", 224, {"widths": (8,) * 6}),
    ("mlp", 8, {}),
    ("resnet", 32, {"depth": 18}),
    ("resnet", 32, {"depth": 34, "preactivation": True}),
    ("resnet", 224, {"depth": 50, "stem": "imagenet"}),
    ("wide_resnet", 32, {"depth": 10, "width_factor": 2}),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name, size, fields", CASES)
def test_logits_and_parameters_are_float32_in_any_precision(name, size, fields, dtype):
    variables, logits = shapes_of(name, size, dtype=jnp.dtype(dtype), **fields)
    assert logits.shape == (2, 10) and logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "name, size, classes, fields, millions",
    [
        ("resnet", 224, 1000, {"depth": 18, "stem": "imagenet"}, 11.69),
        ("resnet", 224, 1000, {"depth": 34, "stem": "imagenet"}, 21.80),
        ("resnet", 224, 1000, {"depth": 50, "stem": "imagenet"}, 25.56),
        ("resnet", 32, 10, {"depth": 18}, 11.17),
        ("wide_resnet", 32, 10, {"depth": 28, "width_factor": 10}, 36.48),
        ("wide_resnet", 32, 10, {"depth": 16, "width_factor": 8}, 10.96),
    ],
)
def test_parameter_counts_are_the_published_ones(name, size, classes, fields, millions):
    variables, _ = shapes_of(name, size, classes=classes, **fields)
    assert count_parameters(variables["params"]) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_computes_what_float32_does(name):
    fields = {
        "wide_resnet": {"depth": 10, "width_factor": 1},
        "resnet": {"depth": 18},
        "cnn": {"widths": (8, 16)},
    }
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    single = MODELS[name](num_classes=10, **fields.get(name, {}))
    half = single.clone(dtype=jnp.bfloat16)
    variables = jax.jit(partial(single.init, train=False))(jax.random.key(1), images)
    a, b = (jax.jit(partial(m.apply, train=False))(variables, images) for m in (single, half))
    np.testing.assert_allclose(a, b, atol=0.05 * float(jnp.abs(a).max()))
    assert (a != b).any()  # it really computes in another precision


def value_and_gradient(function, x, weights):
    value, pull = jax.vjp(function, x)
    return value, *pull(weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_max_pool_is_linens_and_so_is_its_gradient(dtype):
    x = jax.random.randint(jax.random.key(0), (2, 7, 6, 3), 0, 3).astype(dtype)  # many are equal
    linen = lambda x: nn.max_pool(x, (2, 2), (2, 2))
    weights = jnp.arange(2 * 3 * 3 * 3, dtype=dtype).reshape(2, 3, 3, 3)
    both = (value_and_gradient(pool, x, weights) for pool in (max_pool, linen))
    for ours, theirs in zip(*both):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(max_pool(x), linen(x))  # not differentiated


@pytest.mark.parametrize("dtype, error", [("float32", 1e-5), ("bfloat16", 2**-7)])
@pytest.mark.parametrize("shape", [(8, 5, 6, 16), (3, 17, 2, 8), (40, 8)], ids=str)
@pytest.mark.parametrize("use_scale", [True, False])
def test_batch_norm_is_linens_and_so_are_its_gradients(dtype, error, shape, use_scale):
    x = (3 * jax.random.normal(jax.random.key(0), shape) + 2).astype(dtype)
    weights = jax.random.normal(jax.random.key(1), x.shape)

    def results(module):
        norm = partial(module, momentum=0.9, use_scale=use_scale, dtype=jnp.dtype(dtype))
        variables = norm(use_running_average=False).init(jax.random.key(2), x)
        params = jax.tree.map(lambda p: p + 0.3, variables.pop("params"))

        def loss(params, x):
            y, updated = norm(use_running_average=False).apply(
                {"params": params, **variables}, x, mutable=["batch_stats"]
            )
            return (y * weights).sum(), (y, updated)

        grads, (y, updated) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        after = norm(use_running_average=True).apply({"params": params, **updated}, x)
        return {"y": y, "grads": grads, "updated": updated, "after": after}

    ours, theirs = results(BatchNorm), results(nn.BatchNorm)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs)):
        assert a.dtype == b.dtype, path
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        np.testing.assert_allclose(a, b, rtol=error, atol=error, err_msg=str(path))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)


@pytest.mark.parametrize("operation", ["max_pool", "batch_norm"])
def test_pooling_and_batch_norm_under_vmap_and_scan(operation):
    function = {
        "max_pool": max_pool,
        "batch_norm": lambda x: batch_norm(x, jnp.full(3, 2.0), jnp.ones(3), 1e-5)[0],
    }[operation]
    xs = jax.random.normal(jax.random.key(0), (5, 2, 6, 4, 3))

    def value_and_input_gradient(x):
        value, pull = jax.vjp(function, x)
        return value, *pull(jnp.cos(jnp.arange(value.size)).reshape(value.shape))

    each = [jnp.stack(outputs) for outputs in zip(*map(value_and_input_gradient, xs))]
    mapped = jax.jit(jax.vmap(value_and_input_gradient))(xs)
    scanned = jax.lax.scan(lambda carry, x: (carry, value_and_input_gradient(x)), None, xs)[1]
    for ours in (mapped, scanned):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), list(ours), each)


@pytest.mark.parametrize("preactivation", [False, True])
def test_a_residual_block_starts_near_the_identity(preactivation):
    model = MODELS["resnet"](num_classes=10, depth=18, preactivation=preactivation)
    init = jax.jit(partial(model.init, train=False))
    variables = init(jax.random.key(0), jnp.ones((2, 16, 16, 3)))
    scales = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
        if jax.tree_util.keystr(path).endswith("'scale']")
    ]
    zero = sum(not s.any() for s in scales)
    assert zero == (0 if preactivation else 8)  # one for each block where the norm comes last


@pytest.mark.parametrize("inputs, outputs", [(3, 5), (4, 4), (5, 3)])
def test_a_partial_identity_passes_its_inputs_on(inputs, outputs):
    kernel = partial_identity(jax.random.key(0), (3, 3, inputs, outputs))
    x = jax.random.normal(jax.random.key(1), (2, 6, 5, inputs))
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)
    same = min(inputs, outputs)
    np.testing.assert_array_equal(y[..., :same], x[..., :same])
    assert (jnp.abs(y[..., same:]).mean((0, 1, 2)) > 0.1).all()


def test_whitening_decorrelates_the_patches_of_the_images_it_is_made_from():
    noise = jax.random.normal(jax.random.key(0), (50, 12, 12, 3))
    images = jnp.cumsum(noise, 1) + 3 * noise[..., :1]  # neighbours and channels go together
    filters = whitening_filters(images, eps=0.0)
    responses = jax.lax.conv_general_dilated(
        images, filters, (1, 1), "VALID", dimension_numbers=LAYOUT
    ).reshape(-1, 24)
    np.testing.assert_allclose(jnp.cov(responses[:, :12].T), np.eye(12), atol=1e-3)
    np.testing.assert_array_equal(responses[:, :12], -responses[:, 12:])


def test_the_whitening_layer_is_learned_by_nobody():
    model = MODELS["cnn"](num_classes=10, widths=(8,), whiten=True)
    images = jax.random.normal(jax.random.key(0), (20, 8, 8, 1))
    variables = model.init(jax.random.key(1), images, train=False)
    expected = whitening_filters(images)
    np.testing.assert_array_equal(variables["batch_stats"]["whitening"], expected)
    _, updated = model.apply(variables, 2 * images, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(updated["batch_stats"]["whitening"], expected)


@pytest.mark.parametrize("pad, sizes", [(False, [31, 15, 7]), (True, [32, 16, 8])])
def test_a_padded_whitening_layer_keeps_the_size_of_the_image(pad, sizes):
    pooled = []

    def pool(x):
        pooled.append(x.shape[1])
        return max_pool(x)

    shapes_of("cnn", 32, widths=(8, 8, 8), whiten=True, pad_whitening=pad, pool=pool)
    assert pooled[:3] == sizes
