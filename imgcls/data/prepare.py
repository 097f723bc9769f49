"""`python -m imgcls.data.prepare NAME DATA_DIR`: makes a TFDS dataset ready to be read.

Downloads it, or converts a TFRECORD one, to array_record: the only program here that imports
TensorFlow. It says on stderr what it is doing, prints the dataset's directory or (exit code 2) one
line that says what is wrong, and ends when its standard input does.
"""

import contextlib
import functools
import json
import logging
import os
import shutil
import sys
import threading
from pathlib import Path
from urllib.parse import urlparse

import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.file_adapters import ADAPTER_FOR_FORMAT, FileFormat

from imgcls.data.tfds import check_features, find, has_array_record, load, parse
from imgcls.errors import UserError, first_line, visible
from imgcls.run.files import lock, write_bytes


def prepare(name: str, root: Path) -> Path:
    """Returns the version directory of a dataset, now with array_record files."""
    dataset = parse(name)[0]
    waiting = f"waiting for another process that prepares {dataset} in {root}"
    refused = lambda why: (
        f"{dataset} must be prepared in {root}, which can't be written to ({why}); name another "
        "directory with --config.data.dir"
    )
    with lock(root / f".{dataset}.lock", busy=lambda _: _say(waiting), refused=refused):
        directory = find(name, root) or _download(name, root)
        if not has_array_record(load(directory)):
            _convert(directory)
        return directory


def _download(name: str, root: Path) -> Path:
    what = name
    # Without a network, TFDS would retry for minutes, and wait for ever.
    downloader.MAX_RETRIES = 2
    requests.Session.request = functools.partialmethod(requests.Session.request, timeout=(10, 60))  # type: ignore
    try:
        dataset, config, version = parse(name)
        # Not `tfds.builder`, which may read a directory, and import what its files name.
        builder = tfds.builder_cls(dataset)(data_dir=root, config=config, version=version)
        check_features(name, builder)
        if urls := builder.url_infos:
            size = sum(info.size for info in urls.values()) / 2**20
            hosts = ", ".join(sorted({urlparse(url).netloc for url in urls}))
            what = f"{builder.info.full_name} ({size:.0f} MiB from {hosts})"
        _say(f"preparing {what} in {root}, once; a slow server can make this long")
        builder.download_and_prepare(
            file_format=FileFormat.ARRAY_RECORD,
            # It has only TFRECORD files.
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
    except UserError:
        raise
    except Exception as error:  # from the network, the disk, or the dataset's own code
        raise UserError(
            f"cannot download and prepare {what} in {root} ({type(error).__name__}: "
            f"{first_line(error)}). By hand: `tfds build {name} --file_format=array_record` where "
            f"there is a network, then copy ~/tensorflow_datasets/{parse(name)[0]} into {root}, or "
            "name the directory that holds it with TFDS_DATA_DIR or --config.data.dir"
        ) from error
    return Path(builder.data_path)


def _convert(directory: Path) -> None:
    """Adds array_record files beside TFRECORD ones, as `tfds convert_format` does (with Beam).

    A shard gets its name when it is whole, and dataset_info.json, replaced last, commits them all:
    killed at any moment, the directory is still what it was.
    """
    builder = load(directory)
    if builder.info.file_format != FileFormat.TFRECORD:
        raise UserError(f"{directory} is in neither of the formats array_record and tfrecord")
    _say(f"converting {directory} from TFRECORD to array_record, once")
    reader = ADAPTER_FOR_FORMAT[FileFormat.TFRECORD]
    writer = ADAPTER_FOR_FORMAT[FileFormat.ARRAY_RECORD]
    for split in builder.info.splits.values():
        template = split.filename_template.replace(filetype_suffix=writer.FILE_SUFFIX)
        targets = template.sharded_filepaths(split.num_shards)
        for source, target, length in zip(split.filepaths, targets, split.shard_lengths):
            partial = target.parent / f"incomplete.{target.name}"
            try:
                records = [record.numpy() for record in reader.make_tf_data(os.fspath(source))]
                if len(records) != length:
                    raise ValueError(f"{len(records)} records instead of {length}")
                writer.write_examples(partial, enumerate(records))
                os.replace(partial, target)
            except Exception as error:  # TensorFlow's, or the disk's
                raise UserError(f"cannot convert {source}: {first_line(error)}") from error
    info = directory / "dataset_info.json"
    content = json.loads(info.read_text()) | {"alternativeFileFormats": [writer.FILE_SUFFIX]}
    write_bytes(info, json.dumps(content, indent=2).encode())


def _say(text: str) -> None:
    print(f"imgcls: {visible(text)}", file=sys.stderr, flush=True)


def _end_with_parent(folder: Path, others: set[Path]) -> None:
    """Removes what this process left unfinished, but not the `others`, which were there before."""
    os.read(sys.stdin.fileno(), 1)  # returns when the parent is gone, however it ended
    for unfinished in {*folder.rglob("incomplete.*/")} - others:
        shutil.rmtree(unfinished, ignore_errors=True)
    os._exit(1)  # whatever the main thread is doing, and those that download


def main() -> None:
    name, root = sys.argv[1], Path(sys.argv[2])
    folder = root / parse(name)[0]
    arguments = (folder, {*folder.rglob("incomplete.*/")})
    threading.Thread(target=_end_with_parent, args=arguments, daemon=True).start()
    logging.getLogger().setLevel(logging.ERROR)  # each retry would be a warning
    try:
        with contextlib.redirect_stdout(sys.stderr):  # TFDS prints its progress
            directory = prepare(name, root)
    except UserError as error:
        print(error)
        sys.exit(2)
    print(directory)


if __name__ == "__main__":
    main()
