"""The spaces in configs/spaces: each fits the config of its name."""

import importlib

import pytest

from imgcls.config import flatten, validate
from imgcls.tuning.space import canonical, config_at, halton_points
from tests.helpers import ROOT

SPACES = sorted(path.stem for path in (ROOT / "configs" / "spaces").glob("*.py"))


@pytest.mark.parametrize("name", SPACES)
def test_every_point_of_a_space_is_a_valid_config_of_its_own(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    space = canonical(importlib.import_module(f"configs.spaces.{name}").get_space())
    points, _ = halton_points(space, config, 20, seed=0)
    found = [config_at(config, point) for point in points]
    for one in found:
        validate(one)
    assert found[0] == config
    assert len({str(flatten(one)) for one in found}) == 20


@pytest.mark.parametrize("name", SPACES)
def test_a_space_has_the_learning_rate_first_with_the_configs_inside(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    space = importlib.import_module(f"configs.spaces.{name}").get_space()
    scale, low, high = space["optim.learning_rate"]
    assert next(iter(space)) == "optim.learning_rate" and scale == "log"
    assert 3 * low <= config.optim.learning_rate <= high / 3


def test_there_is_a_space_for_each_kind_of_first_sweep():
    assert {"cifar10", "digits", "image_folder"} <= set(SPACES)
