"""Makes tiny TFDS datasets: `python make_tfds_datasets.py DATA_DIR`. Run as a child process only.

Example number n has `picture(n)` and label n % 100, whatever place TFDS gives it.
"""

import sys

import numpy as np

TRAIN, TEST = range(120), range(120, 140)


def picture(number: int) -> np.ndarray:
    """uint8[32, 32, 3], with its number in the first value."""
    image = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
    image[0, 0, 0] = number
    return image


def main(data_dir: str) -> None:
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        """Of the features of CIFAR-100."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=(32, 32, 3))
            features = {
                "id": tfds.features.Text(),
                "image": image,
                "label": tfds.features.ClassLabel(names=[f"class {i}" for i in range(100)]),
                "coarse_label": tfds.features.ClassLabel(num_classes=20),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(TRAIN), "test": self._generate_examples(TEST)}

        def _generate_examples(self, numbers):
            for n in numbers:
                fine, coarse = n % 100, n % 20
                yield n, {"id": str(n), "image": picture(n), "label": fine, "coarse_label": coarse}

    class TinyTfrecord(Tiny):
        """The same as TFRECORD."""

    class TinyBroken(Tiny):
        """With one example that is no picture."""

        def _generate_examples(self, numbers):
            for n, example in super()._generate_examples(numbers):
                yield n, example | ({"image": b"a text"} if n == TEST[0] else {})

    class TinyText(Tiny):
        """Without pictures."""

        def _info(self):
            features = {
                "text": tfds.features.Text(),
                "label": tfds.features.ClassLabel(num_classes=2),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _generate_examples(self, numbers):
            for n in numbers:
                yield n, {"text": str(n), "label": n % 2}

    for builder, file_format in (
        (Tiny, "array_record"),
        (TinyTfrecord, "tfrecord"),
        (TinyBroken, "array_record"),
        (TinyText, "array_record"),
    ):
        config = tfds.download.DownloadConfig(num_shards=2, try_download_gcs=False)
        builder(data_dir=data_dir).download_and_prepare(
            file_format=file_format, download_config=config
        )


if __name__ == "__main__":
    main(sys.argv[1])
