"""Opens the splits of a dataset by TFDS split strings such as "train[:90%]".

Whether the images of a `Split` are in memory, mapped from a file or streamed, nobody else knows.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from imgcls.data import cache
from imgcls.data.cache import Source
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
    describe: Callable[[], Sequence[str]] = tuple  # lines on what the source found
    originals: Sequence[tuple[Source, np.ndarray]] = ()  # sources of the parts, and their indices
    cropped: bool = False  # images are centres of the originals

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

    def picture(self, index: int) -> np.ndarray:
        """uint8[h, w, C]: what is used of a picture, from its source if that can be read."""
        row = index
        for source, kept in self.originals:
            if 0 <= row < len(kept):
                with contextlib.suppress(UserError, OSError):
                    image = source[int(kept[row])]["image"]
                    size = self.parts[0].shape[1:3] if self.cropped else image.shape[:2]
                    scale = min(n / m for n, m in zip(image.shape, size))
                    top, left = (int(n - scale * m) // 2 for n, m in zip(image.shape, size))
                    return image[top : len(image) - top, left : image.shape[1] - left]
            row -= len(kept)
        return self.read(np.array([index]))["image"][0]

    @functools.cached_property
    def identities(self) -> np.ndarray:
        """uint64[N]: of each example, the start of a SHA-256 of its id, image and label."""
        digests: Iterable[bytes | np.ndarray] | None = self.digests
        if digests is None:
            images = (image for part in self.parts for image in part)
            digests = map(cache.digest, images, self.labels)
        heads = (f"{self.parts[0].shape[1:]} {i}\n".encode() for i in self.ids)
        hashes = [hashlib.sha256(head + bytes(d)).digest()[:8] for head, d in zip(heads, digests)]
        return np.frombuffer(b"".join(hashes), "<u8")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the identities, in order."""
        return hashlib.sha256(self.identities.tobytes()).hexdigest()


def load_splits(
    sources: dict[str, Source],
    specs: Sequence[str],
    *,
    image_size: tuple[int, int],
    channels: int,
    resize: str,
    skip_bad: int = 0,
) -> list[Split]:
    """Decodes what TFDS split strings name, and no more.

    Args:
        sources: the dataset's base splits by name.
        specs: such as "train[:90%]" or "train+test[:1000]". They count unreadable examples, too:
            which split an example is in depends on no other's state.
        image_size: (height, width) in pixels.
        channels: of the sources' images.
        resize: see `fit_image`.
        skip_bad: how many unreadable examples each part of a split string may have; they are left
            out.

    Raises:
        UserError: an unknown or empty split, a label out of range, too many unreadable examples, or
            no place for the decoded images.
    """

    def load(spec: str, parts: list[tuple[str, range]]) -> Split:
        ids, decoded = [], []
        for name, part in parts:
            how: Any = {"shape": (*image_size, channels), "resize": resize, "skip_bad": skip_bad}
            decoded.append(cache.load(sources[name], name, part, **how))
            _check_labels(sources[name], name, decoded[-1])
            ids += [f"{name}:{sources[name].ids[i]}" for i in decoded[-1].kept.tolist()]
        if not ids:
            raise UserError(f"split {spec!r} has no readable example: repair some of them")
        images, labels, kept, digests = zip(*(d for d in decoded if len(d.kept)))
        source = sources[parts[0][0]]
        images = [part[: len(rows)] for part, rows in zip(images, kept)]
        read = [(sources[name], d.kept) for (name, _), d in zip(parts, decoded)]
        own = (source.class_names, np.concatenate(digests), getattr(source, "describe", tuple))
        return Split(spec, images, np.concatenate(labels), ids, *own, read, "crop" in resize)

    return [load(spec, parts) for spec, parts in [(s, _resolve(s, sources)) for s in specs]]


def check_disjoint(sources: dict[str, Source], specs: dict[str, str]) -> None:
    """Raises UserError where split strings, by their keys of the config, take an example twice."""
    parts = [(key, *part) for key, spec in specs.items() for part in _resolve(spec, sources)]
    for (key, name, a), (other, same, b) in itertools.combinations(parts, 2):
        if name == same and range(max(a[0], b[0]), min(a[-1], b[-1]) + 1):
            whose = "itself" if key == other else f"{key}={specs[key]!r}"
            raise UserError(f"{other}={specs[other]!r} shares examples with {whose}")


def _resolve(spec: str, sources: dict[str, Source]) -> list[tuple[str, range]]:
    """The base splits that a split string names and their indices, empty ones left out."""
    import tensorflow_datasets as tfds

    infos = {name: SimpleNamespace(num_examples=len(s)) for name, s in sources.items()}
    try:
        parts = tfds.core.ReadInstruction.from_spec(spec).to_absolute(infos)
    # Shards, and "all", are for TFDS's own files.
    except (ValueError, NotImplementedError, AttributeError) as error:
        sizes = ", ".join(f"{name} ({len(s)} examples)" for name, s in sources.items())
        reason = first_line(error).partition(". Should")[0].rstrip(".")
        raise UserError(f"split {spec!r}: {reason}; this dataset has {sizes}") from None
    named = [(p.splitname, range(len(sources[p.splitname]))[p.from_ : p.to]) for p in parts]
    found = [(name, part) for name, part in named if part]
    if not found:
        raise UserError(f"split {spec!r} has no examples; ask for a larger part of the data")
    return found


def _check_labels(source: Source, name: str, decoded: cache.Decoded) -> None:
    labels, classes = decoded.labels, len(source.class_names)
    wrong = np.flatnonzero((labels < 0) | (labels >= classes)) if labels.ndim == 1 else ()
    for row in wrong:
        raise UserError(
            f"example {source.ids[int(decoded.kept[row])]!r} of split {name!r} has label "
            f"{labels[row]}, outside 0..{classes - 1}: correct the dataset"
        )
