"""Where examples come from: scikit-learn's digits, a folder or a table of images, or TFDS.

To add a dataset, write `open_mine(*, channels, data_dir, **_) -> dict[str, Source]` in a file of
this package and name it in `SOURCES`.
"""

import logging
from collections.abc import Callable
from typing import Any

from imgcls.data.cache import Source
from imgcls.data.digits import open_digits
from imgcls.data.folder import open_folder
from imgcls.data.hub import open_hub
from imgcls.data.table import open_table
from imgcls.errors import UserError

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
        UserError: an unknown name, an unfit option, no such folder, damaged data, or no network.
    """
    own = [key for key, value in options.items() if value not in (True, False, "", "warn")]
    if own and (name == "digits" or name not in SOURCES):
        raise UserError(f"config.data.{own[0]} is for image_folder and table: unset it for {name}")
    if name == "digits" and data_dir:
        logging.warning("digits come with scikit-learn: config.data.dir=%s is not used", data_dir)
    if name in SOURCES:
        return SOURCES[name](data_dir=data_dir, channels=channels, **options)
    if name.startswith("hf:"):
        return open_hub(name.removeprefix("hf:"), data_dir=data_dir, channels=channels)
    from imgcls.data.tfds import open_tfds  # an import of half a second

    return open_tfds(name, data_dir=data_dir, channels=channels, others=tuple(SOURCES))
