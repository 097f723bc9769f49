"""What a config leaves open is decided by its training pictures, and by nothing else."""

import json

import numpy as np
import pytest
from PIL import Image

from configs.image_folder import get_config
from imgcls.config import completed, flatten, left_open, validate
from imgcls.data.opening import moments, resolve
from imgcls.data.splits import Split
from imgcls.errors import UserError
from imgcls.experiment import Experiment
from imgcls.keys import OPEN
from imgcls.tuning.space import canonical
from imgcls.tuning.sweep import start
from tests.helpers import all_images, small_config


def photographs(root, sizes, classes=("cat", "dog")):
    rng = np.random.default_rng(0)
    for n, (width, height) in enumerate(sizes):
        folder = root / classes[n % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
    config = get_config()
    config.data.dir = str(root)
    return config


@pytest.fixture
def config(tmp_path):
    return photographs(tmp_path / "photographs", [(70, 50)] * 60)


@pytest.mark.parametrize(
    "median, side", [((32, 32), 64), ((90, 120), 64), ((150, 100), 128), ((200, 300), 224)]
)
def test_the_median_picture_chooses_the_size_and_the_size_the_depth(tmp_path, median, side):
    sizes = [(8, 8)] * 8 + [median] * 14 + [(500, 400)] * 8
    found, _, splits = resolve(photographs(tmp_path, sizes))
    assert found.data.image_size == (side, side)
    assert all_images(splits["train"]).shape[1:] == (side, side, 3)
    assert 3 <= side / 2 ** len(found.model.widths) <= 4
    validate(found)


def test_what_is_chosen_is_plain_valid_said_and_chosen_again(config, capsys):
    config.data.resize, config.optim.backbone_ratio = "", -1.0  # left open by configs/finetune.py
    found, _, splits = resolve(config)
    said = capsys.readouterr().out
    assert left_open(config) == sorted(OPEN, key=[*flatten(config)].index) and not left_open(found)
    validate(found)
    for key in OPEN:
        assert f"{key}={flatten(found)[key]}" in said
    assert "configs/finetune.py" in said and "48 training pictures" in said
    images = all_images(splits["train"]) / 255
    np.testing.assert_allclose(found.data.mean, images.mean((0, 1, 2)), atol=6e-4)
    np.testing.assert_allclose(found.data.std, images.std((0, 1, 2)), atol=6e-4)
    assert flatten(resolve(config)[0]) == flatten(found) == flatten(Experiment(config).config)
    json.dumps(found.to_dict())


def test_the_moments_of_pictures_without_contrast_can_be_divided_by():
    white = np.full((3, 2, 2, 1), 255, np.uint8)
    split = Split("white", [white], np.zeros(3, np.int32), range(3), ("a", "b"))
    assert moments(split) == ((1.0,), (0.01,))


def test_few_pictures_get_as_many_steps_as_many_do(tmp_path):
    for number in (20, 90, 700):
        config = photographs(tmp_path / str(number), [(9, 9)] * number)
        config.data.image_size = (8, 8)
        exp = Experiment(config, test=False)
        assert exp.config.train.batch_size <= len(exp.splits["train"])
        assert exp.total_steps == pytest.approx(config.train.steps, rel=0.03)
        epochs, every = exp.config.train.epochs, exp.config.train.validate_every_epochs
        assert 20 <= epochs / every < 22


def test_what_is_given_is_taken(config):
    given = {"data.image_size": (32, 48), "data.std": (0.5, 0.5, 0.5), "model.widths": (8, 8)}
    given |= {"train.batch_size": 12, "train.epochs": 3, "train.validate_every_epochs": 2}
    config.update_from_flattened_dict(given)
    found = flatten(resolve(config)[0])
    assert {key: found[key] for key in given} == given
    config.data.mean = (0.5, 0.5, 0.5)
    assert flatten(Experiment(config).config) == flatten(config)
    again = completed(get_config(), found)
    assert flatten(again) == found | {"data.dir": ""}


def test_another_network_or_source_leaves_it_the_rest():
    config = get_config("resnet18")
    config.data.name, config.data.validation = "digits", "train[:90]"
    config.data.train = "train[90:]"
    found, _, _ = resolve(config)
    assert found.data.image_size == (64, 64) and found.model.depth == 18
    assert found.model.stem == "imagenet"
    validate(found)


def test_every_size_has_a_depth_that_fits():
    for side in (2, 5, 9, 28, 31, 65, 130, 299):
        config = small_config(data__image_size=(side, side + 3), model__widths=())
        images = np.zeros((40, side, side + 3, 1), np.uint8)
        split = Split("x", [images], np.zeros(40, np.int32), range(40), ("a", "b"))
        found, _, _ = resolve(config, {"train": split})
        assert found.model.widths
        validate(found)


def test_a_sweep_decides_on_the_epochs_and_each_trial_on_the_rest(config, tmp_path):
    space = canonical({"optim.learning_rate": ("log", 0.001, 0.01)})
    config.train.steps = 400
    every = max(400 // 20, 1)
    with pytest.raises(UserError, match=rf"multiples of .*every_epochs={every} under .*=400"):
        start(tmp_path / "sweep", config, space, rungs=(every + 1,))
    start(tmp_path / "sweep", config, space, rungs=(every,))
    start(tmp_path / "sweep", config, space, rungs=(every,))
    plan = json.loads((tmp_path / "sweep/sweep.json").read_text())["config"]
    assert plan["train"]["epochs"] == 400 and plan["data"]["image_size"] == []
    config.train.patience = 2
    with pytest.raises(UserError, match="patience must be 0"):
        start(tmp_path / "other", config, space)
