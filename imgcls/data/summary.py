"""What is said of the data before training and in the report."""

import functools
import itertools
import logging

import numpy as np

from imgcls.data.divide import nearest, thumbnails
from imgcls.data.splits import Split

COMPARED = 2 * 10**8  # pairs of pictures that are looked at for near-duplicates, at most
CHUNK = 1000


def describe(splits: dict[str, Split], *, weighted: bool) -> list[str]:
    """A line on the classes, where examples have one, and a line of what the source found.

    Warns of near-duplicates across splits, of classes of fewer than 2 examples in a split and,
    unless the classes are `weighted`, of one that is over 10 times as common in train as another.
    """
    train = splits["train"]
    _warn_of_duplicates(splits)
    found = ["; ".join(lines)] if (lines := train.describe()) else []
    if train.labels.ndim > 1:
        return found
    names, ranges = train.class_names, []
    for split, examples in splits.items():
        counts = np.bincount(examples.labels, minlength=len(names))
        low, high = int(counts.argmin()), int(counts.argmax())
        span = f"{counts[high]:,} of {names[high]}, {counts[low]:,} of {names[low]}"
        ranges.append(f"{split} {span if counts[high] > counts[low] else f'{counts[low]:,} each'}")
        if few := [f"{names[k]} ({counts[k]})" for k in np.flatnonzero(counts < 2)]:
            shown = ", ".join(few[:10]) + (", ..." if len(few) > 10 else "")
            logging.warning("%s has fewer than 2 examples of %s", split, shown)
        if split == "train":
            commonest = high
            if counts[high] > 10 * counts[low] and not weighted:
                remedy = "--config.task.class_weights=balanced weights all classes alike"
                logging.warning("train has %s, over 10 to 1: %s", span, remedy)
    split = next(name for name in ("test", "validation", "train") if name in splits)
    share = f"{np.mean(splits[split].labels == commonest):.1%} of {split}"
    line = f"{len(names)} classes, the commonest and the rarest: {'; '.join(ranges)}; "
    return [f"{line}always answering {names[commonest]} is right for {share}", *found]


def _warn_of_duplicates(splits: dict[str, Split]) -> None:
    @functools.cache
    def small(name: str) -> np.ndarray:
        examples = splits[name]
        chunks = np.array_split(np.arange(len(examples)), len(examples) // CHUNK + 1)
        return thumbnails(image for rows in chunks for image in examples.read(rows)["image"])

    for one, other in itertools.combinations(splits, 2):
        if len(splits[one]) * len(splits[other]) > COMPARED:
            logging.info("%s and %s are too many to be searched for near-duplicates", one, other)
            continue
        found = nearest(small(other), small(one))
        if rows := np.flatnonzero(found >= 0).tolist():
            a, b = splits[other].ids[rows[0]], splits[one].ids[found[rows[0]]]
            logging.warning(
                "%d of %s are near-duplicates of %s, such as %s and %s: where no folder decides, "
                "--config.data.split_duplicates=train keeps them in train",
                *(len(rows), other, one, a, b),
            )
