"""Every key of a config has one default, one rule and one meaning; mistakes are named."""

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from imgcls import config as configs
from imgcls.augment import AUGMENTATIONS
from imgcls.config import check_resumable, default_config, flatten, from_json, to_json, validate
from imgcls.errors import UserError
from imgcls.keys import RENAMED
from imgcls.models import MODELS
from imgcls.optim import OPTIMIZERS
from tests.helpers import ROOT, small_config

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
# What the eight configs said in commit ed91c69, before defaults stood in one place.
BEFORE = json.loads((ROOT / "tests/fixtures/configs.json").read_text())
MUON_ONLY = {"optim.adam_learning_rate"}
MUON_SGD_ONLY = {"optim.dense_learning_rate", "optim.bias_learning_rate"}
ADDED = {"task.name", "task.class_weights", "data.ignore", "data.group"}
ADDED |= {"data.split_duplicates", "train.steps", "train.patience", "model.init_from"}
ADDED |= {f"optim.{name}" for name in ("backbone_ratio", "layer_decay", "probe_learning_rate")}
ADDED |= {"train.probe_epochs", "train.probe_views"}
ADDED |= {f"augment.{name}" for name in ("crop_fraction", "erase_probability")}
ADDED |= {f"augment.rand_augment_{name}" for name in ("magnitude", "layers")}
# It is to be run to its end on two cores.
SHORTENED = {"cifar10_resnet18": {"train.epochs": 12, "optim.warmup_epochs": 1.0}}
# It was a recipe for digits, and is one for photographs: see its docstring.
PHOTOGRAPHS = {
    "data.image_size": [], "data.mean": [], "data.std": [], "model.widths": [],
    "train.batch_size": 0, "train.epochs": 0, "train.validate_every_epochs": 0,
    "train.checkpoint_every_epochs": 0, "optim.warmup_epochs": 0.0,
    "augment.rotate_degrees": 0.0, "augment.zoom_fraction": 0.0, "augment.translate_pixels": 0,
    "augment.brightness": 0.0, "augment.contrast": 0.0, "augment.saturation": 0.0,
    "augment.flip_probability": 0.5,
}  # fmt: skip
# Eight devices, or 256, can share a batch. A line of the log is for half an epoch.
SHARED = {"train.batch_size": 512, "train.log_every_steps": 48}
OTHER_LENGTHS = SHORTENED | {"cifar10": SHARED, "cifar10_wide": SHARED}
CHANGED = OTHER_LENGTHS | {"image_folder": PHOTOGRAPHS}


def get_config(name):
    return importlib.import_module(f"configs.{name}").get_config()


def test_a_number_behind_a_model_without_a_depth_is_refused():
    assert default_config("resnet50").model.depth == 50
    for name in ("convnext3", "cnn2", "mlp9", "nothing1"):
        with pytest.raises(UserError, match=f"config.model.name='{name}' must be one of"):
            default_config(name)


@pytest.mark.parametrize("name", BEFORE)
def test_the_configs_say_what_they_said_before(name):
    now, before = flatten(to_json(get_config(name))), BEFORE[name] | CHANGED.get(name, {})
    if before["train.log_every_steps"] == 20:  # the default, which suits short epochs now, too
        before["train.log_every_steps"] = 0
    for old, new in RENAMED.items():
        before[new] = before.pop(old)
    # Keys of another optimiser are gone.
    dropped = MUON_ONLY | MUON_SGD_ONLY
    dropped -= {"muon": MUON_ONLY, "muon_sgd": MUON_SGD_ONLY}.get(now["optim.name"], set())
    before = {key: value for key, value in before.items() if key not in dropped}
    if not before["train.small_epochs"]:  # a size that no step used
        before["train.small_image_size"] = []
    assert {key: value for key, value in now.items() if key not in ADDED} == before


def test_a_key_has_one_type_in_all_configs():
    # A float where another config has an int: only one of the two takes --config.key=0.5.
    types = {}
    for name in CONFIGS:
        for key, value in flatten(get_config(name)).items():
            types.setdefault(key, {}).setdefault(type(value), []).append(name)
    assert {key: found for key, found in types.items() if len(found) > 1} == {}


@pytest.mark.parametrize("model", [*MODELS, "resnet50"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_defaults_are_valid_and_every_key_has_a_meaning(model, optimizer):
    config = default_config(model, optimizer)
    if model == "cnn":
        config.model.widths = (4, 4)
    validate(config)
    keys = configs.keys_of(config)
    assert keys.keys() == flatten(config).keys()
    assert [key for key, entry in keys.items() if not entry.meaning] == []
    with pytest.raises(AttributeError):
        config.optim.learning_rat = 1.0


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            {"data__group": "("},
            "config.data.group='[(]' must be a regular expression",
        ),
        (
            {"optim__learning_rate": float("nan")},
            "config.optim.learning_rate=nan must be a number over 0",
        ),
        ({"train__batch_size": -8}, "config.train.batch_size=-8 must be a whole number"),
        ({"data__image_size": (8, -8)}, "config.data.image_size"),
        ({"data__image_size": (8,)}, "config.data.image_size"),
        ({"data__mean": (0.1, 0.2)}, "a number for each of the config.data.channels"),
        ({"data__std": (0.0,)}, "config.data.std"),
        ({"data__std": (0.1, 0.2)}, "a number for each of the config.data.channels"),
        ({"data__mean": ("half",)}, "config.data.mean"),
        ({"data__mean": (np.float32(0.5),)}, "config.data.mean"),  # json has no such number
        ({"model__name": "cnm"}, "one of cnn, mlp, resnet, wide_resnet, vit, "),
        ({"model__widths": (8, 0)}, "config.model.widths"),
        ({"model__dropout_rate": 1.0}, "config.model.dropout_rate"),
        ({"task__label_smoothing": 1.0}, "config.task.label_smoothing"),
        ({"task__class_weights": "equal"}, "one of none, balanced"),
        ({"optim__name": "sdg"}, "one of sgd, adamw, lion, muon"),
        ({"optim__name": "muon_sgd"}, 'lacks .*dense_learning_rate.*optimizer="muon_sgd"'),
        ({"model__name": "resnet"}, 'lacks .depth, .*--config=FILE.py:resnet .*model="resnet"'),
        ({"optim__warmup_epochs": 3.0}, "more than config.train.epochs"),
        ({"train__small_epochs": 3.0, "train__small_image_size": (4, 4)}, "more than config.train"),
        ({"train__small_epochs": 1.0}, "needs a config.train.small_image_size"),
        ({"augment__flip_probability": 1.5}, "config.augment.flip_probability"),
        (
            {"augment__flip_probability": 0.5, "data__alternate_flip": True},
            "config.data.alternate_flip takes the place",
        ),
        ({"augment__rotate_degrees": -1.0}, "rotate_degrees=-1.0 must be .* between 0 and 180"),
        ({"augment__mixup_alpha": -0.1}, "mixup_alpha=-0.1 must be a number of at least 0"),
        ({"augment__zoom_fraction": float("inf")}, "zoom_fraction=inf must be"),
        ({"augment__cutmix_alpha": float("nan")}, "cutmix_alpha=nan must be"),
        ({"data__validation": "", "eval__checkpoint": "best"}, "config.eval.checkpoint=best needs"),
        ({"data__validation": "", "train__patience": 3}, "config.train.patience=3 needs"),
        ({"train__epochs": 0}, "at least 1 where config.train.steps=0"),
        ({"seed": -1}, "config.seed=-1 must be a whole number from 0 to 2"),
        ({"seed": 2**63}, "config.seed=9223372036854775808 must be a whole number from 0 to 2"),
        ({"model__widths": (4, 4, 4, 4)}, "halves the image 4 times"),
        (
            {"train__small_epochs": 1.0, "train__small_image_size": (1, 1)},
            r"too often for config.train.small_image_size=\(1, 1\)",
        ),
        ({"model__widths": (4, 4, 4), "model__whiten": True}, "halves the image 3 times"),
        # Larger than anything computes with.
        ({"data__mean": (10**400,)}, "config.data.mean"),
        ({"data__std": (10**400,)}, "config.data.std"),
        ({"data__image_size": (10**9, 8)}, "each from 1 to 10000"),
        ({"train__small_epochs": 1.0, "train__small_image_size": (10**5, 10**5)}, "small_image_s"),
        ({"model__widths": (10**9, 8)}, "config.model.widths"),
        ({"model__convs_per_block": 10**9}, "convs_per_block=1000000000 must be"),
        ({"augment__translate_pixels": 10**9}, "translate_pixels=1000000000 must be"),
        ({"augment__cutout_pixels": 10**12}, "cutout_pixels=1000000000000 must be"),
        ({"train__epochs": 2**31}, "config.train.epochs=2147483648 must be"),
        ({"data__dir": "a\0b"}, r"config.data.dir='a\\x00b' must be a path"),
    ],
)
def test_values_out_of_range_are_refused_by_name(overrides, message):
    with pytest.raises(UserError, match=message):
        validate(small_config(**overrides))


@pytest.mark.parametrize("value", [{}, np.int64(3), np.float32(0.5), np.ones(2), None, [1]])
def test_values_of_other_types_are_refused_by_name(value):
    for key in ("flip_probability", "cutout_pixels", "unknown"):
        config = small_config().unlock()
        config.augment = {k: v for k, v in config.augment.items() if k != key} | {key: value}
        with pytest.raises(UserError, match=rf"config\.augment\.{key}.* (must be|is not a key)"):
            validate(config)


def test_a_strength_beyond_any_meaning_is_refused():
    mosts = dict.fromkeys(("brightness", "contrast", "saturation", "erase_probability"), 1)
    mosts |= {"rotate_degrees": 180, "crop_fraction": 0.99, "rand_augment_magnitude": 10}
    for name, most in mosts.items():
        validate(small_config(**{f"augment__{name}": float(most)}))
        with pytest.raises(UserError, match=rf"between 0 and {most}"):
            validate(small_config(**{f"augment__{name}": most * 1.004}))


def test_padded_whitening_leaves_room_for_one_more_pooling():
    validate(small_config(model__widths=(4, 4, 4), model__whiten=True, model__pad_whitening=True))


def test_a_missing_and_an_unknown_key_are_refused_by_name():
    config = small_config().unlock()
    del config.train.epochs
    with pytest.raises(UserError, match=r"config\.train\.epochs is missing"):
        validate(config)
    for section, key, near in (
        ("optim", "momentun", "optim.momentum"),
        ("augment", "rotate", "augment.rotate_degrees"),
        ("train", "label_smoothing", "task.label_smoothing"),
    ):
        config = small_config().unlock()
        config[section][key] = 0.9
        with pytest.raises(UserError, match=rf"{key} is .*: did you mean config\.{near}"):
            validate(config)


@pytest.mark.parametrize(
    "model, message",
    [
        ("resnet152", "model.depth=152 must be one of 18, 34, 50, 101"),
        ("wide_resnet20", "model.depth=20 must be 6 n + 4"),
        ("wide_resnet4", "model.depth=4 must be 6 n + 4"),
        ("efficientnet_lite5", "model.depth=5 must be a whole number from 0 to 4"),
        (
            "resnt",
            "config.model.name='resnt' must be one of cnn, mlp, resnet, wide_resnet, vit, convn",
        ),
    ],
)
def test_a_network_that_nobody_made_is_refused(model, message):
    with pytest.raises(UserError, match=re.escape(message)):
        validate(default_config(model))
    config = default_config("resnet")
    config.model.stem = "imagnet"
    with pytest.raises(UserError, match="must be one of cifar, imagenet"):
        validate(config)


@pytest.mark.parametrize(
    "model, changes, message",
    [
        ("vit", {"width": 20}, "model.width must be a multiple of config.model.heads"),
        ("vit", {"patch": 14}, "(32, 32) must be multiples of config.model.patch"),
        ("convnext", {"depths": (2, 2)}, "model.widths and depths need one number each per stage"),
        ("convnext", {"widths": (8,) * 5, "depths": (1,) * 5}, "halves the image 6 times, too"),
    ],
)
def test_keys_of_a_model_that_do_not_fit_each_other_or_the_images_are_refused(
    model, changes, message
):
    config = default_config(model)
    config.model.update(changes)
    with pytest.raises(UserError, match=re.escape(message)):
        validate(config)


@pytest.mark.parametrize("model", ["mlp", "vit"])
def test_small_epochs_are_refused_for_a_network_made_for_one_size(model):
    config = default_config(model)
    config.train.small_epochs, config.train.small_image_size = 1.0, (8, 8)
    with pytest.raises(UserError, match="must be 0"):
        validate(config)


def test_a_config_survives_its_file():
    saved = json.loads(json.dumps(to_json(small_config())))
    assert flatten(from_json(saved)) == flatten(small_config())


@pytest.mark.parametrize(
    "name", sorted(BEFORE.keys() - {"image_folder"})
)  # today's is another recipe
def test_the_config_of_an_older_run_is_completed_with_what_its_code_did(name):
    nested = {}
    for key, value in (BEFORE[name] | OTHER_LENGTHS.get(name, {})).items():
        section, _, last = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[last] = value
    loaded, now = flatten(from_json(nested)), flatten(get_config(name))
    for key in ("train.small_image_size", "train.log_every_steps"):
        loaded.pop(key), now.pop(key)
    assert loaded == now


def test_resuming_asks_for_the_same_config_except_for_what_is_harmless():
    def check(saved, **overrides):
        check_resumable(saved, small_config(**overrides), Path("runs/x"))

    saved = small_config()
    check(saved, data__dir="/elsewhere", train__log_every_steps=1, model__cpu_kernels="off")
    with pytest.raises(UserError, match=r"optim\.learning_rate=0\.5 \(was .*another --workdir"):
        check(saved, optim__learning_rate=0.5)
    with pytest.raises(UserError, match="more epochs would be another run"):
        check(saved, train__epochs=9)
    saved = small_config(optim__schedule="constant")
    check(saved, optim__schedule="constant", train__epochs=9)
    with pytest.raises(UserError, match="train.epochs=1"):
        check(saved, optim__schedule="constant", train__epochs=1)


def test_an_augmentation_s_own_keyword_is_a_key(monkeypatch):
    def erase(rng, images, labels, probability, *, erase_area=0.25):
        """Blanks a part of each image.

        Args:
            erase_area: share of the image
        """
        return images, labels

    monkeypatch.setitem(AUGMENTATIONS, "erase_probability", erase)
    config = default_config()
    assert (config.augment.erase_probability, config.augment.erase_area) == (0.0, 0.25)
    assert configs.keys_of(config)["augment.erase_area"].meaning == "share of the image"
    validate(config)
