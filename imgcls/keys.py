"""Every key of a config that is no component's own: default, rule and meaning."""

import contextlib
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from imgcls import optim
from imgcls.models import MODELS
from imgcls.models.resnet import STAGES
from imgcls.task import TASKS


class Rule(NamedTuple):
    kind: type
    accepts: Callable[[Any], bool]
    expected: str


class Key(NamedTuple):
    default: Any
    rule: Rule
    meaning: str
    harmless: bool = False  # it changes no result: the runs of one workdir may differ in it


def one_of(names: Iterable[str]) -> Rule:
    return Rule(str, lambda x: x in names, f"one of {', '.join(n or '(empty)' for n in names)}")


def up_to(limit: float) -> Rule:
    allowed = "of at least 0" if limit == math.inf else f"between 0 and {limit}"
    return Rule(float, lambda x: 0 <= x <= limit and math.isfinite(x), f"a number {allowed}")


def whole(least: int, limit: int = 2**31 - 1) -> Rule:
    return Rule(int, lambda x: least <= x <= limit, f"a whole number from {least} to {limit}")


def is_regex(text: str) -> bool:
    with contextlib.suppress(re.error):
        return re.compile(text) is not None
    return False


TEXT = Rule(str, lambda x: True, "text")
NAME = Rule(str, bool, "a name")
PATH = Rule(str, lambda x: "\0" not in x, "a path")
COUNT, COUNT_OR_ZERO = whole(1), whole(0)
POSITIVE = Rule(float, lambda x: 0 < x < math.inf, "a number over 0")
NOT_NEGATIVE = up_to(math.inf)
FRACTION = Rule(float, lambda x: 0 <= x < 1, "a number of at least 0 and under 1")
RESIZES = one_of(("squash", "crop", "squash-bicubic", "crop-bicubic", ""))
RATIO = Rule(float, lambda x: x == -1 or 0 <= x <= 1, "a number from 0 to 1, or -1")
SHARE = Rule(float, lambda x: 0 < x <= 1, "a number over 0, up to 1")
FLAG = Rule(bool, lambda x: True, "True or False")
MOST, LARGEST = 10**6, 10**4  # XLA ends the process where an array has 2**63 elements
ARE_COUNTS = lambda x: all(type(n) is int and 0 < n <= MOST for n in x)
COUNTS = Rule(tuple, ARE_COUNTS, f"a tuple of integers from 1 to {MOST}")
IS_SIZE = lambda x: x == () or (len(x) == 2 and ARE_COUNTS(x) and max(x) <= LARGEST)
SIZE = Rule(tuple, IS_SIZE, f"(height, width), each from 1 to {LARGEST}, or ()")
FINITE = lambda x: all(type(n) in (int, float) and math.isfinite(n) for n in x)
CHANNELS = Rule(tuple, FINITE, "a number for each channel, as a tuple")
OVER_0 = lambda x: FINITE(x) and all(n > 0 for n in x)
DEVIATIONS = Rule(tuple, OVER_0, "a number over 0 for each channel, as a tuple")
PRECISIONS = one_of(("default", "high", "highest"))
SEED = Rule(int, lambda x: 0 <= x < 2**63, "a whole number from 0 to 2**63 - 1")
REGEX = Rule(str, is_regex, "a regular expression, such as patient_[0-9]+")
SPLIT = Rule(str, bool, "a TFDS split string such as train[:90%]")

KEYS = {
    "seed": Key(0, SEED, "of all randomness and of the order of examples"),
    "data.name": Key("digits", NAME, "digits, image_folder, table, hf:NAME, or any TFDS dataset"),
    "data.dir": Key("", PATH, "folder or table of images; TFDS's (empty: TFDS_DATA_DIR)", True),
    "data.train": Key("train", SPLIT, "split string of the training examples"),
    "data.validation": Key("", TEXT, "split string to make choices on; empty: none"),
    "data.test": Key("test", SPLIT, "split string that is evaluated once, at the end"),
    "data.image_size": Key((32, 32), SIZE, "(height, width) of the input; (): by the pictures"),
    "data.channels": Key(3, Rule(int, lambda x: x in (1, 3), "1 or 3"), "1 (gray) or 3 (RGB)"),
    "data.resize": Key("squash", RESIZES, "the whole image, or crop its centre"),
    "data.mean": Key((0.5, 0.5, 0.5), CHANNELS, "of training images in [0, 1]; (): measured"),
    "data.std": Key((0.25, 0.25, 0.25), DEVIATIONS, "their standard deviation; (): measured"),
    "data.skip_bad": Key(0, COUNT_OR_ZERO, "unreadable images that each split may have", True),
    "data.follow_links": Key(True, FLAG, "follow symbolic links in a folder of images"),
    "data.ignore": Key("", TEXT, "names of folders below data.dir to leave out: docs,raw"),
    "data.group": Key("", REGEX, "what of a path names its patient, video ...: kept in one split"),
    "data.split_duplicates": Key("warn", one_of(("warn", "train")), "warn, or keep them in train"),
    "data.alternate_flip": Key(False, FLAG, "mirror each image in every second epoch"),
    "task.name": Key("classification", one_of(TASKS), "the objective"),
    "model.name": Key("cnn", one_of(MODELS), "the architecture, which has keys of its own"),
    "model.dtype": Key("float32", one_of(("float32", "bfloat16")), "where the device has it"),
    "model.matmul_precision": Key("default", PRECISIONS, "of float32 products on GPUs and TPUs"),
    "model.init_from": Key("", PATH, "start: a workdir, a .safetensors file, timm/NAME of a hub"),
    "model.cpu_kernels": Key("auto", one_of(("auto", "off")), "fast ones on x86; off: XLA", True),
    "optim.name": Key("adamw", one_of(optim.OPTIMIZERS), "the optimiser, which has own keys"),
    "optim.learning_rate": Key(0.001, POSITIVE, "the peak, for a whole batch"),
    "optim.schedule": Key("cosine", one_of(optim.SCHEDULES), "after the warmup"),
    "optim.warmup_epochs": Key(0.0, NOT_NEGATIVE, "epochs of linear rise from 0"),
    "optim.clip_norm": Key(0.0, NOT_NEGATIVE, "bound on the gradient's global norm; 0: none"),
    "optim.backbone_ratio": Key(1.0, RATIO, "learning rate of all but the last layer; 0: frozen"),
    "optim.layer_decay": Key(1.0, SHARE, "learning rate of a block, relative to the next one's"),
    "optim.probe_learning_rate": Key(0.001, POSITIVE, "the peak while the last layer learns alone"),
    "optim.ema_decay": Key(0.0, FRACTION, "of the average of parameters, per step; 0: none"),
    "train.batch_size": Key(128, COUNT_OR_ZERO, "images per step, on all devices together"),
    "train.accumulate_steps": Key(1, COUNT, "parts of a batch, computed (and normalised) in turn"),
    "train.epochs": Key(10, COUNT_OR_ZERO, "passes over the training examples; 0: by train.steps"),
    "train.steps": Key(0, COUNT_OR_ZERO, "of all epochs together, about, where those are 0"),
    "train.probe_epochs": Key(0.0, NOT_NEGATIVE, "first epochs, which train the last layer alone"),
    "train.probe_views": Key(1, COUNT, "of an image, the first as it is, to train that layer on"),
    "train.small_epochs": Key(0.0, NOT_NEGATIVE, "first epochs that train on smaller images"),
    "train.small_image_size": Key((), SIZE, "(height, width) in those epochs"),
    "train.log_every_steps": Key(0, COUNT_OR_ZERO, "0: 20, or 4 between validations", True),
    "train.validate_every_epochs": Key(1, COUNT_OR_ZERO, "epochs between two; 0: 20 in all"),
    "train.checkpoint_every_epochs": Key(1, COUNT_OR_ZERO, "0: as validations", True),
    "train.patience": Key(0, COUNT_OR_ZERO, "validations without a better one to stop at; 0: none"),
    "train.max_bad_steps": Key(0, COUNT_OR_ZERO, "steps to skip whose loss is not finite"),
    "eval.batch_size": Key(512, COUNT, "images per step of evaluation and prediction", True),
    "eval.checkpoint": Key("latest", one_of(("latest", "best")), "the one to evaluate on test"),
}

HARMLESS = [key for key, entry in KEYS.items() if entry.harmless]
# Values that leave a key open: the training pictures decide, see `data.opening.resolve`.
OPEN: dict[str, Any] = {"data.image_size": (), "data.mean": (), "data.std": (), "model.widths": ()}
OPEN |= {"train.batch_size": 0, "train.epochs": 0, "train.validate_every_epochs": 0}
OPEN |= {"data.resize": "", "optim.backbone_ratio": -1.0}
# What a component is given, and so is no key of a config.
GIVEN = {"num_classes", "dtype", "parent", "name", "class_counts"}
GIVEN |= {"conv", "dense", "norm", "pool", "act", "over_images"}
# Rules of components' own keys. The type of its default decides about any other.
OWN_RULES = {
    "model.dropout_rate": FRACTION,
    "model.norm_momentum": FRACTION,
    "model.drop_path_rate": FRACTION,
    "optim.momentum": FRACTION,
    "resnet.depth": Rule(int, lambda x: x in STAGES, f"one of {', '.join(map(str, STAGES))}"),
    "resnet.stem": one_of(("cifar", "imagenet")),
    "efficientnet_lite.depth": whole(0, 4),
    "vit.width": COUNT,
    "wide_resnet.depth": Rule(int, lambda x: x in range(10, 999, 6), "6 n + 4, such as 16 or 28"),
    "task.label_smoothing": FRACTION,
    "task.class_weights": one_of(("none", "balanced")),
}
BY_TYPE = {bool: FLAG, int: whole(1, 1000), float: NOT_NEGATIVE, tuple: COUNTS, str: TEXT}

# Old key -> today's, for the configs of older runs.
RENAMED = {
    "optim.label_smoothing": "task.label_smoothing",
    "train.early_epochs": "train.small_epochs",
    "train.early_image_size": "train.small_image_size",
}
