"""Any image classification dataset of TFDS, read from array_record files.

TensorFlow is never imported here: `imgcls.data.prepare`, which downloads or converts a dataset
with it, is a child process.
"""

import contextlib
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.core.dataset_builder import load_default_config_name
from tensorflow_datasets.core.dataset_info import dataset_info_path, read_from_json
from tensorflow_datasets.core.file_adapters import FileFormat
from tensorflow_datasets.core.read_only_builder import ReadOnlyBuilder
from tensorflow_datasets.proto import tf_example_pb2

from imgcls.data.images import decode_image, hash_files
from imgcls.errors import UserError, did_you_mean, first_line, printable
from imgcls.run import signals

_NAME = re.compile(r"(\w+)(?:/(\w[\w.-]*))?(?::(\d+\.\d+\.\d+))?")
_OWN = "tensorflow_datasets.core.features."  # where TFDS's own features are
_KINDS = [
    f"{getattr(tfds.features, name).__module__}.{name}"
    for name in ("Image", "ClassLabel", "Text", "Scalar", "Tensor")
]
_REMEDY = "delete that directory and run again, or name another with --config.data.dir"


class TfdsSource:
    """One split of a prepared dataset, decoded by `data.images`. See `data.cache.Source`."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, channels: int):
        self._records = builder.as_data_source(
            split,
            deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
            file_format=FileFormat.ARRAY_RECORD,
        )
        self._name, self._channels = f"{builder.data_path} {split}", channels
        info = builder.info.splits[split]
        self._shards = [_check_shard(*shard) for shard in zip(info.filepaths, info.shard_lengths)]
        self.class_names = tuple(builder.info.features["label"].names)
        self.ids = range(len(self._records))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the contents of the files, each of which is read for it."""
        return f"tfds {hash_files(self._shards, self._channels)}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return next(self.read([index]))

    def read(self, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
        indices = [self.ids[index] for index in indices]  # an IndexError as of any sequence
        try:
            records = self._records.__getitems__(indices)
            examples = [tf_example_pb2.Example.FromString(record) for record in records]
        except Exception as error:  # array_record and protobuf each have their own
            raise UserError(f"{self._name} is damaged ({first_line(error)}); {_REMEDY}") from error
        # Decoded when it is asked for: one large picture is in memory, not all of them.
        return (self._decode(i, example.features.feature) for i, example in zip(indices, examples))

    def _decode(self, index: int, features: Any) -> dict[str, Any]:
        encoded = features["image"].bytes_list.value[0]
        label = features["label"].int64_list.value[0]
        image = decode_image(encoded, channels=self._channels, name=f"{self._name}[{index}]")
        return {"image": image, "label": label}


def open_tfds(
    name: str, *, data_dir: str | None, channels: int, others: Sequence[str] = ()
) -> dict[str, Any]:
    """Opens the splits of NAME[/CONFIG][:VERSION], of the newest version that `data_dir` holds.

    The first use prepares the dataset in a child process, for as long as its download takes.
    `others` are names that are no datasets of TFDS, for the error of an unknown one.

    Raises:
        UserError: an unknown name, a dataset without image and label, a damaged directory, one that
            can't be written to, or no network.
    """
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in root:
        raise UserError(f"{root} is remote: copy the dataset to a local --config.data.dir")
    if not root.isprintable():  # TFDS prints it
        raise UserError(
            f"{printable(root)} holds control characters: name another --config.data.dir"
        )
    if (root := os.path.expanduser(root)).startswith("~/"):
        raise UserError("there is no home directory: name a folder with --config.data.dir")
    root = Path(root).absolute()
    try:
        dataset, directory = parse(name)[0], find(name, root)
    except OSError as error:
        raise UserError(f"{root}: {error.strerror}; name another --config.data.dir") from error
    known = tfds.list_builders(with_community_datasets=False) if directory is None else [dataset]
    if dataset not in known:
        near = did_you_mean(dataset, [*others, *known]) or "name one of them"
        raise UserError(
            f"unknown dataset {name}: there are {', '.join(others)} and those of TFDS; {near}"
        )
    if not directory or not has_array_record(load(directory)):
        directory = _prepare_in_child(name, root)
    builder = load(directory)
    check_features(name, builder)
    return {split: TfdsSource(builder, split, channels) for split in builder.info.splits}


def parse(name: str) -> tuple[str | Any, ...]:
    """Splits NAME[/CONFIG][:VERSION]."""
    if not (match := _NAME.fullmatch(name)):
        near = did_you_mean(name, tfds.list_builders(with_community_datasets=False)) or "correct it"
        raise UserError(f"dataset {name!r} is not of the form NAME[/CONFIG][:VERSION]: {near}")
    return match.groups()


def find(name: str, root: Path) -> Path | None:
    """The version directory of a dataset, complete or not; None if there is none."""
    dataset, config, version = parse(name)
    parent = root / dataset
    try:
        parent = parent / (config or load_default_config_name(parent) or "")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{parent}/.config is damaged ({first_line(error)}); {_REMEDY}") from error
    paths = [path for path in parent.glob(version or "*") if tfds.core.Version.is_valid(path.name)]
    return max(paths, key=lambda path: tfds.core.Version(path.name), default=None)


def load(directory: Path) -> tfds.core.DatasetBuilder:
    """TFDS's reader of a version directory, made from its files alone.

    TFDS would import whatever class a file names as a feature.
    """
    try:
        info = read_from_json(dataset_info_path(directory))
        info.features.CopyFrom(_read_features(directory / "features.json").to_proto())
        builder = ReadOnlyBuilder(builder_dir=directory, info_proto=info)
        if not builder.info.splits:
            raise ValueError("it has no splits")
    except Exception as error:  # TFDS, json and protobuf each have their own for a damaged file
        why = first_line(error)
        raise UserError(f"{directory} is no complete TFDS dataset ({why}); {_REMEDY}") from error
    return builder


def _read_features(path: Path) -> tfds.features.FeaturesDict:
    """The features of `_KINDS` that a file names; TFDS's other ones are left out.

    Raises ValueError where it names a class that is not TFDS's.
    """
    saved = json.loads(path.read_text(encoding="utf-8"))
    # "type" and "content" are of TFDS before 4.5.
    features = saved.get("content") or saved.get("featuresDict", {}).get("features", {})
    known = {}
    for name, feature in {"": saved, **features}.items():
        kind = feature["type"] if "type" in feature else feature["pythonClassName"]
        if not kind.startswith(_OWN):
            raise ValueError(f"{kind} is no feature of TFDS")
        if kind in _KINDS:
            feature.pop("python_class_name", None)  # the same to protobuf, whichever comes last
            known[name] = tfds.features.FeatureConnector.from_json(feature)
    if not known:  # TFDS would then read the file itself
        raise ValueError("it has no features that are used here")
    return tfds.features.FeaturesDict(known)


def has_array_record(builder: tfds.core.DatasetBuilder) -> bool:
    return FileFormat.ARRAY_RECORD in builder.info.available_file_formats()


def check_features(name: str, builder: tfds.core.DatasetBuilder) -> None:
    """Refuses what isn't a picture and the index of its class."""
    features = builder.info.features
    found = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    image, label = found.get("image"), found.get("label")
    is_picture = isinstance(image, tfds.features.Image) and np.dtype(image.np_dtype).kind == "u"
    if not (is_picture and isinstance(label, tfds.features.ClassLabel)):
        has = ", ".join(sorted(found)) or type(features).__name__
        raise UserError(f"{name} is no image classification dataset (image, label): it has {has}")


def _check_shard(path: Any, length: int) -> Any:
    """Returns the path. The number of records tells a truncated shard."""
    if not path.exists() or ArrayRecordReader(os.fspath(path)).num_records() != length:
        raise UserError(f"{path} is missing, truncated or damaged; {_REMEDY}")
    return path


def _prepare_in_child(name: str, root: Path) -> Path:
    """Runs `imgcls.data.prepare`, which shares our stderr and ends when we do."""
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(f"preparing {name} in {root} needs TensorFlow: pip install tensorflow-cpu")
    with subprocess.Popen(
        [sys.executable, "-m", "imgcls.data.prepare", name, root],
        stdin=subprocess.PIPE,  # its end tells the child to end
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C in a terminal reaches us alone, and we end the child
        cwd=Path(__file__).parents[2],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"},
    ) as child:
        assert child.stdin and child.stdout
        try:
            while child.poll() is None:
                signals.poll()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(0.1)
            answer = child.stdout.read().strip()
        finally:
            child.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)
            child.kill()
    if child.returncode:
        signals.poll()  # the one that we both got
        raise UserError(answer or f"preparing {name} in {root} ended with {child.returncode}")
    return Path(answer)
