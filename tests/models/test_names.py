"""timm's and torchvision's arrays fit the models here, under one rule, with their logits."""

import json
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
