"""The 8x8 handwritten digits that come with scikit-learn: 1,797 pictures, no download."""

import hashlib
from typing import Any

import numpy as np


class DigitsSource:
    """One split of the digits. See `data.cache.Source`."""

    class_names = tuple("0123456789")

    def __init__(self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray, channels: int):
        """Takes all images uint8[N, 8, 8] and labels [N], and which of them make the split."""
        self.ids = tuple(str(index) for index in indices)
        self._images = np.repeat(images[indices, ..., None], channels, axis=-1)
        self._labels = labels[indices]
        content = self._images.tobytes() + self._labels.astype("<i4").tobytes()
        self.fingerprint = f"digits {hashlib.sha256(content).hexdigest()}"

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._images[index], "label": int(self._labels[index])}


def open_digits(*, channels: int, **_: Any) -> dict[str, DigitsSource]:
    """Opens "train" (1,437 examples) and "test" (360), a fixed, stratified fifth.

    Both are shuffled, for scikit-learn's order is by writer: a slice of "train" is a fair sample.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(
        np.arange(len(images)), test_size=0.2, stratify=digits.target, random_state=0
    )
    return {
        split: DigitsSource(images, digits.target, indices, channels)
        for split, indices in (("train", train), ("test", test))
    }
