"""From the data that a config names to its splits, and to what the config leaves them to decide."""

import math
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from imgcls.config import completed, left_open
from imgcls.data.sources import Source, open_sources
from imgcls.data.splits import Split, check_disjoint, load_splits
from imgcls.run.logs import say

SIZES, SHRINK = (64, 128, 224), 1.5
BATCH, VALIDATIONS, MEASURED = 64, 20, 1000  # the last: pictures whose mean is taken
FEW, FEW_EPOCHS = 1000, 10  # training pictures, and epochs, that ask for something else
Sources = dict[str, Source]


def open_data(config: ConfigDict) -> Sources:
    """The source of each base split of the dataset that config.data names."""
    c = config.data
    own = {key: c[key] for key in ("follow_links", "ignore", "group", "split_duplicates")}
    return open_sources(c.name, data_dir=c.dir or None, channels=c.channels, **own)


def open_splits(config: ConfigDict, *names: str, sources: Sources | None = None) -> list[Split]:
    """The splits that config.data names "train", "validation" or "test", decoded."""
    c, sources = config.data, sources or open_data(config)
    used = [name for name in ("train", "validation", "test") if c[name]]
    check_disjoint(sources, {f"config.data.{name}": c[name] for name in used})
    how: Any = {key: c[key] for key in ("channels", "resize", "skip_bad")}
    return load_splits(sources, [c[n] for n in names], image_size=tuple(c.image_size), **how)


def resolve(
    config: ConfigDict, splits: dict[str, Split] | None = None
) -> tuple[ConfigDict, Sources, dict[str, Split]]:
    """A copy of the config whose training pictures decided `keys.OPEN`, and what was opened."""
    left, sources, opened = left_open(config), {} if splits else open_data(config), splits or {}
    config = completed(config, {"data.resize": "squash"})
    if "data.image_size" in left:
        size = opened["train"].parts[0].shape[1:3] if splits else _size(sources)
        config = completed(config, {"data.image_size": size})
    opened = opened or {"train": open_splits(config, "train", sources=sources)[0]}
    train, c = opened["train"], config.train
    batch = c.batch_size or min(BATCH, 1 << len(train).bit_length() - 1)
    steps_per_epoch = max(len(train) // batch, 1)
    epochs = c.epochs or max(round(c.steps / steps_per_epoch), 1)
    blocks = max(round(math.log2(min(config.data.image_size) / 4)), 1)  # to about 4x4
    found = {
        "data.resize": config.data.resize,
        "data.image_size": config.data.image_size,
        "model.widths": tuple(max(256 >> block, 16) for block in reversed(range(blocks))),
        "optim.backbone_ratio": float(len(train) >= FEW),
        "train.batch_size": batch,
        "train.epochs": epochs,
        "train.validate_every_epochs": max(epochs // VALIDATIONS, 1),
    }
    if {"data.mean", "data.std"} & {*left}:
        found |= zip(("data.mean", "data.std"), moments(train))
    shown = " ".join(f"{key}={found[key]}" for key in left)
    say(f"chosen by {len(train):,} training pictures, where no --config.KEY=VALUE does: {shown}")
    if "train.epochs" in left and len(train) < FEW:
        say(f"under {FEW:,} pictures, configs/finetune.py, a pretrained network, does better")
        if found["data.image_size"] == (SIZES[-1],) * 2:
            say("--config.data.image_size=(64,64) was no worse on 480 photographs, and faster")
    elif "train.epochs" in left and epochs < FEW_EPOCHS:
        say(f"--config.train.steps={FEW_EPOCHS * steps_per_epoch} or more may do better")
    return completed(config, found), sources, opened


def _size(sources: Sources) -> tuple[int, int]:
    """A square of one of SIZES: the first that shrinks the median picture by at most SHRINK."""
    source: Any = sources.get("train") or next(iter(sources.values()))
    decoded = (source[i]["image"].shape[:2] for i in range(min(len(source), 100)))
    sides = sorted(map(min, getattr(source, "sizes", None) or decoded))
    fits = [side for side in SIZES if sides[len(sides) // 2] <= SHRINK * side]
    return ((*fits, SIZES[-1])[0],) * 2


def moments(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation (at least 0.01) per channel, of up to MEASURED images in [0, 1]."""
    rows = np.unique(np.linspace(0, len(split) - 1, MEASURED).astype(int))[:, None]
    images = (split.read(row)["image"] / np.float32(255) for row in rows)
    each = np.array([(x.mean((0, 1, 2)), np.square(x).mean((0, 1, 2))) for x in images], float)
    mean, square = each.mean(0)
    std = np.sqrt(np.maximum(square - mean**2, 1e-4))
    return tuple(mean.round(3).tolist()), tuple(std.round(3).tolist())
