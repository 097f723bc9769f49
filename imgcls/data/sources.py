"""Where examples come from: scikit-learn's digits, a folder or a table of images, or TFDS.

To add a dataset, write `open_mine(*, channels, data_dir, **_) -> dict[str, Source]` in a file of
this package and name it in `SOURCES`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from imgcls.data.digits import open_digits
from imgcls.data.folder import open_folder
from imgcls.data.hub import open_hub
from imgcls.data.table import open_table


class Source(Protocol):
    """One split of a dataset, read in any order and from any thread.

    `source[i]` is {"image": uint8[h, w, channels], "label": int}, or raises BadExampleError. A
    source that reads many examples faster than one by one also has `read(indices) -> iterable
    of examples`, which raises at the first bad one. One that found something to say of its
    examples before training has `describe() -> lines`.
    """

    class_names: tuple[str, ...]  # of each label
    fingerprint: str  # changes whenever the decoded examples may have changed
    ids: Sequence[str] | range  # printable and unique: paths below the folder, or indices

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


SOURCES: dict[str, Callable[..., Any]] = {
    "digits": open_digits,
    "image_folder": open_folder,
    "table": open_table,
}


def open_sources(
    name: str, *, data_dir: str | None, channels: int, **options: Any
) -> dict[str, Source]:
    """Opens every split of a dataset: "train", usually "test", and "validation" if it has one.

    Args:
        name: a key of `SOURCES`, or "hf:NAME", see `open_hub`; anything else is a TFDS dataset,
            which TFDS downloads on first use: "mnist", "cifar10:3.0.2", "cifar10_corrupted/fog_3".
        data_dir: the folder of images, the table's file, or where TFDS keeps its datasets (None:
            the variable TFDS_DATA_DIR, else ~/tensorflow_datasets).
        channels: 1 (gray) or 3 (RGB), of every decoded image.
        options: of a folder or a table of images, see `open_folder`.

    Raises:
        UserError: an unknown name, no such folder, damaged data, or no network to download it.
    """
    if name in SOURCES:
        return SOURCES[name](data_dir=data_dir, channels=channels, **options)
    if name.startswith("hf:"):
        return open_hub(name.removeprefix("hf:"), data_dir=data_dir, channels=channels)
    from imgcls.data.tfds import open_tfds  # an import of half a second

    return open_tfds(name, data_dir=data_dir, channels=channels, others=tuple(SOURCES))
