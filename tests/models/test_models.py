"""Every model: shapes, dtypes, parameter counts that the papers state."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from imgcls import cpu
from imgcls.models import MODELS, efficientnet, resnet
from imgcls.models.cnn import LAYOUT, max_pool, partial_identity, whitening_filters
from imgcls.run import machine
from imgcls.state import count_parameters
from tests.cpu.test_kernels import assert_close, modes

RNG = jax.random.key(7)


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
    ("vit", 32, {"depth": 2, "layer_scale": True}),
    ("vit", 28, {"depth": 2, "patch": 14, "class_token": False}),
    ("convnext", 35, {"depths": (1, 1, 2, 1)}),
    ("efficientnet_lite", 33, {}),
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
        ("resnet", 224, 1000, {"depth": 101, "stem": "imagenet"}, 44.55),
        ("resnet", 32, 10, {"depth": 18}, 11.17),
        ("wide_resnet", 32, 10, {"depth": 28, "width_factor": 10}, 36.48),
        ("wide_resnet", 32, 10, {"depth": 16, "width_factor": 8}, 10.96),
        ("vit", 224, 1000, {}, 22.05),
        ("convnext", 224, 1000, {}, 28.59),
        ("efficientnet_lite", 224, 1000, {}, 4.65),
        ("efficientnet_lite", 300, 1000, {"depth": 4}, 13.01),
    ],
)
def test_parameter_counts_are_the_published_ones(name, size, classes, fields, millions):
    variables, _ = shapes_of(name, size, classes=classes, **fields)
    assert count_parameters(variables["params"]) / 1e6 == pytest.approx(millions, abs=0.01)


TINY = {
    "cnn": {"widths": (8, 16), "convs_per_block": 1},
    "mlp": {"dense_widths": (8,)},
    "resnet": {},
    "wide_resnet": {"depth": 10, "width_factor": 1},
    "vit": {"patch": 4, "width": 8, "depth": 1, "heads": 2, "layer_scale": True},
    "convnext": {"widths": (8,), "depths": (1,)},
    "efficientnet_lite": {"dropout_rate": 0.0},
}


@pytest.fixture
def few_stages(monkeypatch):
    """Fewer stages of resnet and efficientnet_lite, which take a minute to compile otherwise."""
    monkeypatch.setitem(resnet.STAGES, 18, ((1,), False))
    monkeypatch.setattr(efficientnet, "STAGES", ((3, 2, 2, 8, 1),))


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_computes_what_float32_does(name, few_stages):
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    single = MODELS[name](num_classes=10, **TINY[name])
    half = single.clone(dtype=jnp.bfloat16)
    variables = jax.jit(partial(single.init, train=False))(jax.random.key(1), images)
    # As models are compiled: without our options, jaxlib 0.12 gives NaN in bfloat16 on a CPU.
    jit = partial(jax.jit, compiler_options=machine.compiler_options())
    a, b = (jit(partial(m.apply, train=False))(variables, images) for m in (single, half))
    np.testing.assert_allclose(a, b, atol=0.05 * float(jnp.abs(a).max()))
    assert (a != b).any()  # it really computes in another precision


QUICK = ("mlp", "resnet")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in MODELS]
)
def test_every_derivative_exists_and_the_operations_for_cpus_keep_it(name, few_stages, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    ops = {k: op for k, op in cpu.ops("float32").items() if hasattr(MODELS[name], k)}
    plain, tuned = (MODELS[name](5, **TINY[name], **given) for given in ({}, ops))
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    variables = jax.jit(partial(plain.init, train=True))(jax.random.key(1), images)
    # Drawn anew, because ResNet's scales of zero would leave nothing to differentiate.
    draw = lambda p, seed: jax.random.normal(jax.random.key(seed), p.shape) / p[..., 0].size ** 0.5
    args = [jax.tree.map(partial(draw, seed=seed), variables["params"]) for seed in (2, 3)]

    def loss(model, params):
        given = variables | {"params": params}
        logits, _ = model.apply(given, images, train=True, mutable=["batch_stats"])
        return jax.nn.log_softmax(logits)[:, 0].mean()

    some = partial(modes, names=("jvp", "jvp of grad", "vmap of grad"))  # all would take minutes
    results = (jax.jit(partial(some, partial(loss, model)))(*args) for model in (tuned, plain))
    # A bias in front of a BatchNorm has a gradient of rounding errors alone.
    assert_close(*results, error=1e-3, least=1e-3)


@pytest.mark.parametrize(
    "name, fields",
    [
        pytest.param("vit", {"depth": 2}, marks=pytest.mark.slow),
        ("convnext", {"depths": (2,)}),
    ],
)
def test_drop_path_leaves_out_whole_branches_of_an_image_or_doubles_them(name, fields):
    model = MODELS[name](3, **TINY[name] | fields, drop_path_rate=0.5)
    images = jnp.tile(jax.random.normal(jax.random.key(0), (1, 8, 8, 3)), (64, 1, 1, 1))
    rng, apply = np.random.default_rng(0), jax.jit(model.apply, static_argnames="train")
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    flat = {k: rng.normal(size=x.shape) for k, x in flatten_dict(shapes, sep=".").items()}
    found = apply(unflatten_dict(flat, sep="."), images, train=True, rngs={"dropout": RNG})
    scales = [k for k in flat if k.endswith("gamma") and "blocks_1" in k]  # of the last block
    expected = []
    for factors in itertools.product((0, 2), repeat=len(scales)):
        changed = flat | {k: f * flat[k] for k, f in zip(scales, factors)}
        expected.append(apply(unflatten_dict(changed, sep="."), images[:1], train=False))
    differences = jnp.abs(found[:, None] - jnp.concatenate(expected)).max(-1)
    assert differences.min(1).max() < 1e-4 * jnp.abs(found).max()
    assert set(differences.argmin(1).tolist()) == set(range(len(expected)))


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
