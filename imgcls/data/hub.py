"""`hf:NAME`: datasets of huggingface.co, or of a folder, through the datasets library."""

import contextlib
import functools
import hashlib
import os
from pathlib import Path
from typing import Any

from imgcls.data.images import DECODER, decode_image
from imgcls.errors import UserError, first_line, printable


class HubSource:
    """One split of such a dataset. See `data.cache.Source`."""

    def __init__(self, name: str, rows: Any, channels: int, image: str, label: str):
        """Takes rows whose columns `image`, undecoded, and `label` are meant."""
        self._name, self._rows, self._channels = name, rows, channels
        self._image, self._label = image, label
        self.class_names = tuple(map(printable, rows.features[label].names))
        self.ids = range(len(rows))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the pictures, each of which is read for it, and of the labels."""
        state = hashlib.sha256(f"{self._channels} {DECODER}".encode())
        for row in self._rows:
            state.update(hashlib.sha256(_content(row[self._image])).digest())
            state.update(f"{row[self._label]}\n".encode())
        return f"hf {state.hexdigest()}"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, where = self._rows[int(index)], f"{self._name}[{index}]"
        image = decode_image(_content(row[self._image]), channels=self._channels, name=where)
        return {"image": image, "label": -1 if (found := row[self._label]) is None else found}


def _content(image: Any) -> bytes:
    """Of a picture's file, which a row holds or names; empty where neither can be read."""
    with contextlib.suppress(OSError, TypeError):
        return image["bytes"] or Path(image["path"]).read_bytes()
    return b""


def open_hub(name: str, *, data_dir: str | None, channels: int, **_: Any) -> dict[str, Any]:
    """Opens the splits of a dataset of pictures with one label; NAME:CONFIG chooses a config.

    Args:
        name: on huggingface.co, or a folder of Parquet files or of pictures.
        data_dir: where datasets keeps what it downloads (None: its own cache).
        channels: 1 (gray) or 3 (RGB).

    Raises:
        UserError: no such package, network or dataset, or none of an Image and a ClassLabel.
    """
    shown, (path, _, config) = f"config.data.name=hf:{printable(name)}", name.partition(":")
    try:
        import datasets

        found = datasets.load_dataset(os.path.expanduser(path), config or None, cache_dir=data_dir)
    except ModuleNotFoundError:
        raise UserError(f"{shown} needs pip install -r requirements-hub.txt") from None
    except Exception as error:  # each of its parts has its own
        raise UserError(
            f"{shown} cannot be opened ({type(error).__name__}: {first_line(error)}): check the "
            "name (NAME:CONFIG where there are several) and the network, or name a folder with it"
        ) from error
    features = next(iter(found.values())).features
    images = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if not images or len(labels) != 1:
        has = ", ".join(f"{key} ({type(kind).__name__})" for key, kind in features.items())
        raise UserError(
            f"{shown} must have an Image and one ClassLabel, but it has {printable(has)}"
        )
    undecoded = found.cast_column(images[0], datasets.Image(decode=False))
    own = (channels, images[0], labels[0])
    return {split: HubSource(f"{name} {split}", rows, *own) for split, rows in undecoded.items()}
