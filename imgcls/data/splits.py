"""Opens the splits of a dataset by TFDS split strings such as "train[:90%]".

Whether the images of a `Split` are in memory, mapped from a file or streamed, nobody else knows.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np

from imgcls.data import cache
from imgcls.data.sources import Source
from imgcls.errors import UserError, first_line


@dataclasses.dataclass(frozen=True)
class Split:
    """Decoded examples, in the source's order."""

    name: str  # the split string
    parts: Sequence[np.ndarray]  # uint8[n, H, W, C], N images together, for read() alone
    labels: np.ndarray  # int32[N], or float32[N, K] where a label is a vector
    ids: Sequence[str] | range
    class_names: tuple[str, ...]
    digests: np.ndarray | None = None  # uint8[N, 32] of the examples, where they are known

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The batch of the given examples; index -1 is padding: zeros, masked out.

        Returns:
            {"image": uint8[B, H, W, C], "label": as `labels`, "mask": bool[B]}.
        """
        mask = indices >= 0
        indices = np.where(mask, indices, 0)
        if len(self.parts) == 1:
            images = np.take(self.parts[0], indices, axis=0)
        else:
            starts = np.cumsum([0, *map(len, self.parts)])
            parts = np.searchsorted(starts, indices, side="right") - 1
            images = np.stack([self.parts[p][i - starts[p]] for p, i in zip(parts, indices)])
        labels = self.labels[indices]
        images[~mask] = labels[~mask] = 0
        return {"image": images, "label": labels, "mask": mask}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the decoded images, the labels and the ids, in order."""
        digests = self.digests
        if digests is None:
            images = (image for part in self.parts for image in part)
            digests = b"".join(map(cache.digest, images, self.labels))
        head = "\n".join([str(self.parts[0].shape[1:]), *map(str, self.ids), ""])
        return hashlib.sha256(head.encode() + bytes(digests)).hexdigest()


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
        specs: such as "train[:90%]" or "train+test[:1000]". They count unreadable examples, too:
            which split an example is in depends on no other's state.
        image_size: (height, width) in pixels.
        channels: of the sources' images.
        resize: "squash" or "crop", see `fit_image`.
        skip_bad: how many unreadable examples a base split may have; they are left out.

    Raises:
        UserError: an unknown or empty split, a label out of range, too many unreadable examples, or
            no place for the decoded images.
    """
    slices = [_resolve(spec, sources) for spec in specs]
    base = {}
    for name in sorted({name for parts in slices for name, _, _ in parts}):
        base[name] = cache.load(
            sources[name], name, shape=(*image_size, channels), resize=resize, skip_bad=skip_bad
        )
        _check_labels(sources[name], name, base[name])
    return [_join(spec, parts, base, sources) for spec, parts in zip(specs, slices)]


def overlapping(sources: dict[str, Source], a: str, b: str) -> bool:
    """Whether two split strings share an example."""
    return any(
        name == other and start < other_stop and other_start < stop
        for name, start, stop in _resolve(a, sources)
        for other, other_start, other_stop in _resolve(b, sources)
    )


def _resolve(spec: str, sources: dict[str, Source]) -> list[tuple[str, int, int]]:
    """The (base split, start, stop) that a split string names, empty ones left out."""
    import tensorflow_datasets as tfds

    infos = {name: SimpleNamespace(num_examples=len(s)) for name, s in sources.items()}
    try:
        parts = tfds.core.ReadInstruction.from_spec(spec).to_absolute(infos)
    # Shards, and "all", are for TFDS's own files.
    except (ValueError, NotImplementedError, AttributeError) as error:
        sizes = ", ".join(f"{name} ({len(s)} examples)" for name, s in sources.items())
        reason = first_line(error).rstrip(".")
        raise UserError(f"split {spec!r}: {reason}; this dataset has {sizes}") from None
    bounds = [(p.splitname, slice(p.from_, p.to)) for p in parts]
    slices = [(name, *bound.indices(len(sources[name]))[:2]) for name, bound in bounds]
    slices = [(name, start, stop) for name, start, stop in slices if start < stop]
    if not slices:
        raise UserError(f"split {spec!r} has no examples; ask for a larger part of the data")
    return slices


def _check_labels(source: Source, name: str, decoded: cache.Decoded) -> None:
    labels, classes = decoded.labels, len(source.class_names)
    wrong = np.flatnonzero((labels < 0) | (labels >= classes)) if labels.ndim == 1 else ()
    for row in wrong:
        raise UserError(
            f"example {source.ids[int(decoded.kept[row])]!r} of split {name!r} has label "
            f"{labels[row]}, outside 0..{classes - 1}: correct the dataset"
        )


def _join(
    spec: str,
    slices: list[tuple[str, int, int]],
    base: dict[str, cache.Decoded],
    sources: dict[str, Source],
) -> Split:
    cut = []  # views: nothing is copied
    ids = []
    for name, start, stop in slices:
        rows = slice(*np.searchsorted(base[name].kept, (start, stop)))
        cut.append(cache.Decoded(*(array[rows] for array in base[name])))
        ids += [f"{name}:{sources[name].ids[i]}" for i in cut[-1].kept.tolist()]
    parts, labels, _, digests = zip(*cut)
    class_names = sources[slices[0][0]].class_names
    return Split(spec, parts, np.concatenate(labels), ids, class_names, np.concatenate(digests))
