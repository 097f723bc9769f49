"""timm's and torchvision's arrays fit the models here, under one rule, with their logits."""

import json
import math
from functools import partial

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from imgcls.config import default_config, flatten
from imgcls.experiment import Experiment, build_model
from imgcls.models import efficientnet, resnet
from imgcls.models.names import fitting, from_torch, to_torch
from imgcls.pretrained import Weights, fit, resample
from tests.models.make_timm import CLASSES, FIXTURE, SIZE, random_arrays, random_images

KEPT = json.loads(FIXTURE.read_text())
WHOLE = {
    "timm/resnet18": ("resnet18", {"stem": "imagenet"}),
    "timm/resnet34": ("resnet34", {"stem": "imagenet"}),
    "timm/resnet50": ("resnet50", {"stem": "imagenet"}),
    "timm/vit_small_patch16_224": ("vit", {}),
    "timm/vit_small_patch14_dinov2": ("vit", {"patch": 14, "layer_scale": True}),
    "timm/convnext_tiny": ("convnext", {}),
    "timm/convnext_nano": ("convnext", {"widths": (80, 160, 320, 640), "depths": (2, 2, 8, 2)}),
    "timm/tf_efficientnet_lite0": ("efficientnet_lite", {}),
    "torchvision/resnet18": ("resnet18", {"stem": "imagenet"}),
    "torchvision/vit_b_16": ("vit", {"width": 768, "heads": 12}),
    "torchvision/convnext_tiny": ("convnext", {}),
}
VIT = {"patch": 8, "width": 32, "depth": 2, "heads": 2}
CONVNEXT = {"widths": (8, 8, 16, 16), "depths": (1, 1, 2, 1)}
TINY = {
    "resnet18": ("resnet18", {"stem": "imagenet"}),
    "resnet50": ("resnet50", {"stem": "imagenet"}),
    "vit": ("vit", VIT),
    "dinov2": ("vit", VIT | {"layer_scale": True}),
    "convnext": ("convnext", CONVNEXT),
    "convnext of nano's form": ("convnext", CONVNEXT),
    "lite": ("efficientnet_lite", {}),
}
QUICK = ("torchvision/convnext_tiny", "resnet18", "dinov2", "lite")  # the others are slow tests


def config_of(model, fields, size):
    config = default_config(model)
    config.model.update(fields)
    config.data.image_size = (size, size)
    return config


def each(names):
    return [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", each(WHOLE))
def test_the_arrays_of_a_public_model_are_those_of_ours(name):
    model, fields = WHOLE[name]
    config = config_of(model, fields, 224)
    target = Experiment(config, class_names=("", "")).state_target()
    named = {n: np.broadcast_to(np.float32(0), s) for n, s in KEPT["shapes"][name].items()}
    arrays = from_torch(named)
    told = fitting(arrays)
    assert told and told.items() <= flatten(config).items()
    assert {f"model.{key}" for key in fields} <= told.keys()
    found = fit(Weights(arrays, {"path": name}, {}, told), target, config)
    assert len(found) == len(flatten_dict(target.eval_variables)) - 2


@pytest.mark.parametrize("name", each(TINY))
def test_the_logits_are_timms(name, monkeypatch):
    monkeypatch.setitem(resnet.STAGES, 18, ((1, 1, 1, 1), False))
    monkeypatch.setitem(resnet.STAGES, 50, ((1, 1, 1, 1), True))
    monkeypatch.setattr(efficientnet, "STAGES", ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2)))
    model, fields = TINY[name]
    network = build_model(config_of(model, fields, SIZE), CLASSES)
    named = random_arrays(KEPT["shapes"][name])
    arrays, images = from_torch(named), random_images()
    shapes = jax.eval_shape(partial(network.init, train=False), jax.random.key(0), images)
    paths = flatten_dict(shapes)
    assert {"_".join(path[1:]) for path in paths} == arrays.keys()
    found = {p: arrays["_".join(p[1:])].reshape(s.shape) for p, s in paths.items()}
    logits = jax.jit(partial(network.apply, train=False))(unflatten_dict(found), images)
    np.testing.assert_allclose(logits, KEPT["logits"][name], atol=1e-4)
    if "nano" not in name:  # whose perceptrons are 1x1 convolutions in timm
        back = to_torch(found, model.rstrip("0123456789"))
        assert back.keys() == named.keys()
        for key, array in named.items():
            np.testing.assert_array_equal(back[key], array, err_msg=key)


def test_positions_are_resampled_as_by_timm():
    grid = np.random.default_rng(0).normal(size=(1, 1 + 49, 3)).astype(np.float32)
    found = resample(grid, 1 + 4 * 5, (64, 80))
    np.testing.assert_allclose(found, KEPT["positions"], atol=1e-6)


def test_positions_of_any_grid_are_resampled_as_that_grid():
    """Of pictures twice as high as wide, whose 4 x 2 tokens are not those of a square."""
    cells = np.random.default_rng(0).normal(size=(1, 4, 2, 3)).astype(np.float32)
    for first in (0, 1):
        tokens = np.concatenate([np.ones((1, first, 3)), cells.reshape(1, 8, 3)], 1)
        for rows, columns in ((2, 4), (4, 2)):
            found = resample(tokens, first + rows * columns, (rows, columns), (64, 32))
            grid = jax.image.resize(cells, (1, rows, columns, 3), "cubic")
            np.testing.assert_allclose(found[:, first:].reshape(grid.shape), grid, atol=1e-6)
            assert np.all(found[:, :first] == 1)


def test_names_in_a_wrapper_of_a_model_are_those_of_the_model():
    named = random_arrays(KEPT["shapes"]["resnet18"])
    for prefix in ("module.", "model.", "_orig_mod.module."):
        found = from_torch({prefix + name: array for name, array in named.items()})
        assert found.keys() == from_torch(named).keys()


@pytest.mark.parametrize("depth", efficientnet.FACTORS)
def test_the_depth_of_a_lite_network_is_told_by_its_arrays(depth):
    wider, deeper = efficientnet.FACTORS[depth]
    blocks, width = math.ceil(3 * deeper), int(40 * wider + 4) // 8 * 8
    arrays = {f"blocks_4_{i}_bn1_bias": np.zeros(1) for i in range(blocks)}
    arrays |= {"conv_stem_kernel": np.zeros((3, 3, 3, 32)), "blocks_2_0_bn3_bias": np.zeros(width)}
    assert fitting(arrays)["model.depth"] == depth


def test_no_depth_is_told_of_a_residual_network_that_is_none_of_ours():
    arrays = {f"layer3_{i}_conv1_kernel": np.zeros(1) for i in range(36)}
    told = fitting(arrays | {"conv1_kernel": np.zeros((7, 7, 3, 64))})
    assert told == {"data.channels": 3, "model.name": "resnet", "model.stem": "imagenet"}
