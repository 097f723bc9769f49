"""Opens a dataset's splits, keeps them decoded in memory, and gives batches by index.

The rest of the project sees a `Split`: a length, labels, ids and `read(indices) -> Batch`. A split
that streams from disk can offer the same, in the same order.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil

from imgcls.data.images import fit_image
from imgcls.data.sources import Source
from imgcls.errors import BadExampleError, UserError, first_line
from imgcls.run import machine, signals
from imgcls.run.logs import progress

CACHE_FORMAT = 2  # raise when the decoded bytes of an unchanged source would differ
CHUNK = 250  # examples decoded by one task


@dataclasses.dataclass(frozen=True)
class Split:
    """Decoded examples of one split, in the source's order."""

    name: str  # the TFDS split string, such as "train[:90%]"
    images: np.ndarray  # uint8[N, H, W, C]
    labels: np.ndarray  # int32[N]
    ids: Sequence[str]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The batch of the given examples; index -1 is padding: zeros, masked out."""
        mask = indices >= 0
        images = np.take(self.images, np.where(mask, indices, 0), axis=0)
        images[~mask] = 0
        return {"image": images, "label": np.where(mask, self.labels[indices], 0), "mask": mask}


def epoch_order(examples: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of examples in an epoch: a function of (seed, epoch) alone."""
    return np.random.default_rng([seed, epoch]).permutation(examples)


class TrainOrder:
    """Which examples each training step takes. The last partial batch of an epoch is dropped."""

    def __init__(self, examples: int, *, batch_size: int, seed: int):
        self.batch_size, self.steps_per_epoch = batch_size, examples // batch_size
        self._order = functools.lru_cache(2)(functools.partial(epoch_order, examples, seed=seed))
        self._mirrored_first = np.random.default_rng([seed, 0, 1]).integers(2, size=examples)

    def __getitem__(self, step: int) -> np.ndarray:
        epoch, i = divmod(step, self.steps_per_epoch)
        return self._order(epoch=epoch)[i * self.batch_size : (i + 1) * self.batch_size]

    def mirrored(self, indices: np.ndarray, step: int) -> np.ndarray:
        """bool[B]: the examples that alternating flip mirrors in a step's epoch.

        A random half in the first epoch, the other half in the next, and so on: in any two epochs
        the network sees both views of each image (arXiv 2404.00498, section 3.6).
        """
        return (self._mirrored_first[indices] + step // self.steps_per_epoch) % 2 == 1


def eval_order(examples: int, *, batch_size: int) -> Iterator[np.ndarray]:
    """Every example once, in order, in batches of one size: the last is padded with -1."""
    for start in range(0, examples, batch_size):
        indices = np.arange(start, start + batch_size)
        yield np.where(indices < examples, indices, -1)


def load_splits(
    sources: dict[str, Source],
    specs: Sequence[str],
    *,
    image_size: tuple[int, int],
    channels: int,
    resize: str,
    skip_bad: int = 0,
) -> list[Split]:
    """Decodes the splits that TFDS split strings name, each base split once.

    Args:
        sources: the dataset's base splits by name.
        specs: such as "train[:90%]" or "train+test[:1000]".
        image_size: (height, width) in pixels.
        channels: of the sources' images.
        resize: "squash" or "crop", see `fit_image`.
        skip_bad: how many unreadable examples a base split may have; they are left out.

    Raises:
        UserError: an unknown or empty split, a label out of range, too many unreadable examples, or
            more decoded bytes than there is memory.
    """
    slices = [_resolve(spec, sources) for spec in specs]
    names = sorted({name for parts in slices for name, _, _ in parts})
    shape = (*image_size, channels)
    _check_memory(sum(len(sources[name]) for name in names) * math.prod(shape))
    base = {
        name: _load(sources[name], name, shape=shape, resize=resize, skip_bad=skip_bad)
        for name in names
    }
    return [_join(spec, parts, base) for spec, parts in zip(specs, slices)]


def overlapping(sources: dict[str, Source], a: str, b: str) -> bool:
    """Whether two split strings share an example."""
    return any(
        name == other and start < other_stop and other_start < stop
        for name, start, stop in _resolve(a, sources)
        for other, other_start, other_stop in _resolve(b, sources)
    )


def _resolve(spec: str, sources: dict[str, Source]) -> list[tuple[str, int, int]]:
    """The (base split, start, stop) that a split string names."""
    import tensorflow_datasets as tfds

    infos = {name: SimpleNamespace(num_examples=len(s)) for name, s in sources.items()}
    try:
        parts = tfds.core.ReadInstruction.from_spec(spec).to_absolute(infos)
    # Shards, and "all", are for TFDS's own files.
    except (ValueError, NotImplementedError, AttributeError) as error:
        sizes = ", ".join(f"{name} ({len(s)} examples)" for name, s in sources.items())
        reason = first_line(error).rstrip(".")
        raise UserError(f"split {spec!r}: {reason}; this dataset has {sizes}") from None
    slices = [
        (p.splitname, p.from_ or 0, len(sources[p.splitname]) if p.to is None else p.to)
        for p in parts
    ]
    if not any(start < stop for _, start, stop in slices):
        raise UserError(f"split {spec!r} has no examples; ask for a larger part of the data")
    return slices


def _join(spec: str, parts: list[tuple[str, int, int]], base: dict[str, Split]) -> Split:
    cut = [(base[name], slice(start, stop)) for name, start, stop in parts]
    if len(cut) == 1:  # a view: nothing is copied
        images, labels = cut[0][0].images[cut[0][1]], cut[0][0].labels[cut[0][1]]
    else:
        images = np.concatenate([split.images[rows] for split, rows in cut])
        labels = np.concatenate([split.labels[rows] for split, rows in cut])
    ids = [name for split, rows in cut for name in split.ids[rows]]
    return Split(spec, images, labels, ids, cut[0][0].class_names)


def _check_memory(needed: int) -> None:
    free = psutil.virtual_memory().available
    if needed > 0.9 * free:
        raise UserError(
            f"the decoded images need {needed / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB of "
            "memory are free: lower config.data.image_size or take a part, such as "
            "--config.data.train='train[:10%]'"
        )


def _load(
    source: Source, name: str, *, shape: tuple[int, int, int], resize: str, skip_bad: int
) -> Split:
    """One base split, from the cache where it is there, else decoded and cached."""
    key = json.dumps([CACHE_FORMAT, source.fingerprint, shape, resize])
    folder = _cache_dir() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
    arrays = _read_cache(folder)
    if arrays is None:
        arrays = _decode(source, name, shape=shape, resize=resize, skip_bad=skip_bad)
        _write_cache(folder, arrays)
    images, labels, kept = arrays["images"], arrays["labels"], arrays["kept"]
    if len(source) - len(kept) > skip_bad:
        raise _too_many_bad(len(source) - len(kept), skip_bad, ["see an earlier run's warnings"])
    outside = np.flatnonzero((labels < 0) | (labels >= len(source.class_names)))
    if len(outside):
        raise UserError(
            f"example {source.ids[int(kept[outside[0]])]!r} of split {name!r} has label "
            f"{labels[outside[0]]}, outside 0..{len(source.class_names) - 1}: correct the dataset"
        )
    ids = [f"{name}:{source.ids[i]}" for i in kept.tolist()]
    return Split(name, images, labels, ids, source.class_names)


def _decode(
    source: Source, name: str, *, shape: tuple[int, int, int], resize: str, skip_bad: int
) -> dict[str, np.ndarray]:
    images = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int32)

    def decode(start: int) -> list[tuple[int, str]]:
        bad = []
        for i, example in _examples(source, range(start, min(start + CHUNK, len(source)))):
            signals.poll()
            if isinstance(example, BadExampleError):
                bad.append((i, str(example)))
                continue
            images[i] = fit_image(example["image"], image_size=shape[:2], resize=resize)
            labels[i] = example["label"]
        return bad

    bad = []
    starts = range(0, len(source), CHUNK)
    executor = ThreadPoolExecutor(machine.cpu_cores())  # Pillow releases the GIL
    try:
        results = executor.map(decode, starts)
        with progress(len(source), f"decoding {name}", "images") as bar:
            for start, found in zip(starts, results):
                bad += found
                bar.update(min(CHUNK, len(source) - start))
    finally:
        executor.shutdown(cancel_futures=True)
    if len(bad) > skip_bad:
        raise _too_many_bad(len(bad), skip_bad, [reason for _, reason in bad])
    for _, reason in bad:
        logging.warning("skipped: %s", reason)
    kept = np.setdiff1d(np.arange(len(source)), [i for i, _ in bad])
    if bad:
        images, labels = images[kept], labels[kept]
    return {"images": images, "labels": labels, "kept": kept}


def _examples(source: Source, indices: range) -> Iterator[tuple[int, Any]]:
    """(index, example or BadExampleError), read together where the source can."""
    if hasattr(source, "read"):
        with contextlib.suppress(BadExampleError):  # one by one, below, tells which
            yield from zip(indices, source.read(indices))
            return
    for i in indices:
        try:
            yield i, source[i]
        except BadExampleError as error:
            yield i, error


def _too_many_bad(count: int, skip_bad: int, reasons: list[str]) -> UserError:
    shown = "; ".join(reasons[:5]) + (f"; and {len(reasons) - 5} more" if len(reasons) > 5 else "")
    return UserError(
        f"{count} unreadable example(s), config.data.skip_bad allows {skip_bad}: {shown}. "
        f"Mend or remove them, or skip them with --config.data.skip_bad={count}"
    )


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imgcls" / "datasets"


def _read_cache(folder: Path) -> dict[str, np.ndarray] | None:
    try:
        arrays = {k: np.load(folder / f"{k}.npy") for k in ("images", "labels", "kept")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:  # truncated, or not an array
        logging.warning("%s is damaged (%s): decoding again", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return arrays


def _write_cache(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Commits by rename, so that a kill or a second process leaves a whole entry or none."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
        try:
            for key, value in arrays.items():
                np.save(temporary / f"{key}.npy", value)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if not folder.exists():  # else another process was faster
            logging.warning("cannot cache decoded images in %s (%s)", folder.parent, error)
