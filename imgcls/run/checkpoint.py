"""Checkpoints of a run: saved in the background, committed by one rename, verified when read.

The only module that knows orbax. A checkpoint is a directory `<step>/` with the arrays and a JSON
object, in which the SHA-256 of every array stands beside what the loop wants to keep. Validation
scores are in `validation.json`, because a step may be validated after it was saved.
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils.epath.gpath import PosixGPath
from jax.experimental.multihost_utils import process_allgather

from imgcls.errors import CheckpointError, UserError, first_line
from imgcls.parallel import is_main
from imgcls.run.workdir import write_json


class Checkpoints:
    """The checkpoints in one directory.

    Keeps three: the two latest (the older is the fallback if the newer is damaged) and the best on
    validation: the highest top-1, or the lowest loss if there is no top-1; of equals the latest.
    Errors of saving and reading are `CheckpointError`.
    """

    def __init__(self, directory: Path, *, read_only: bool = False):
        self._directory = directory.absolute()  # orbax refuses relative paths
        self._scores_path = self._directory / "validation.json"
        self._writes = not read_only and is_main()
        self._passes_over = ("best",) if read_only else ("best", "latest")  # if it is damaged
        self._damaged: set[int] = set()
        if misread := re.search(r"\\|gs:/|[\ud800-\udfff]", str(self._directory)):
            raise UserError(
                f"{str(directory)!r} cannot hold checkpoints, because tensorstore misreads "
                f"{misread[0]!r} in a path: use another --workdir"
            )
        # Created in the background, a directory that cannot be made would hang the exit.
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        self._saver = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
        try:
            if self._writes:
                self._directory.mkdir(parents=True, exist_ok=True)
                for unfinished in self._directory.glob("*.orbax-checkpoint-tmp*"):
                    _remove(unfinished)  # what a kill left of a save
                if self._scores_path.is_dir():
                    self._set_aside(self._scores_path.name)
            self._scores = self._read_scores()
            if not read_only and any(self._directory.glob("damaged-[0-9]*")):
                self.find("latest")
        except OSError as error:
            raise CheckpointError(f"{directory} cannot be opened: {first_line(error)}") from error

    @property
    def validated_step(self) -> int:
        """The last step that was validated, up to the restored one; 0 if none was."""
        return max(self._scores, default=0)

    def steps(self) -> list[int]:
        """The steps saved, oldest first; not every one need be good."""
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _blame(self._directory, error) from error
        steps = {int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name)}
        return sorted(step for step in steps - self._damaged if self._path(step).is_dir())

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Saves in the background, once the save before is committed.

        Args:
            step: the number of batches seen.
            state: a pytree of arrays. The caller may donate them at once: XLA does not reuse a
                buffer that is still read on a CPU, and those of other devices are copied first.
            meta: what else to keep, in JSON types.
        """
        self.wait()
        leaves = {
            # Whole arrays as numpy's, because orbax would compile slices of them, one per device.
            name: leaf if _is_split(leaf) else np.asarray(leaf)
            for name, leaf in _named_leaves(state).items()
        }
        # A copy, because the caller's may change while it is being written.
        meta = json.loads(json.dumps(meta | {"leaves": _describe(leaves)}))
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves),
            meta=ocp.args.JsonSave(meta | {"sha256": _hash_json(meta)}),
        )
        with self._saving():
            if not self._path(step).is_dir():
                self._set_aside(step)  # somebody's file of that name
            self._damaged.discard(step)
            self._saver.save(_Path(self._path(step)), args=items)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Keeps the validation metrics of a step, which decide which checkpoint is the best."""
        self._scores[step] = _finite(metrics)
        self._write_scores()

    def wait(self) -> None:
        """Returns when the last save is committed. Then deletes what need not be kept."""
        with self._saving():
            self._saver.wait_until_finished()
            steps = self.steps() if self._writes else []
            for step in set(steps) - {*steps[-2:], self._best()}:
                # Renamed first, so that a kill leaves no half of a checkpoint.
                unwanted = self._path(step).with_suffix(".orbax-checkpoint-tmp-unwanted")
                _remove(self._path(step).rename(unwanted))

    def close(self) -> None:
        self.wait()
        self._saver.close()

    def restore_latest(self, target: Any) -> tuple[Any, dict[str, Any]]:
        """The newest good checkpoint; a damaged newer one is renamed aside, with a warning.

        Scores of later steps are dropped, because those steps come again.
        """
        state, meta = self.restore("latest", target)
        if validated := meta.pop("validated_step", 0):  # older runs have it here
            self._scores.setdefault(validated, {})
        known, step = len(self._scores), self.find("latest")
        self._scores = {s: score for s, score in self._scores.items() if s <= step}
        if len(self._scores) < known:
            self._write_scores()
        return state, meta

    def restore(self, which: str, target: Any) -> tuple[Any, dict[str, Any]]:
        """The checkpoint `which`. A damaged one is set aside, and the next best or latest is used.

        With `read_only` nothing is set aside, and only the best has a next.

        Args:
            which: "latest", "best" or a step.
            target: a pytree of `jax.ShapeDtypeStruct`s that say where each array shall live.

        Returns:
            The state, and the `meta` that was saved with it.
        """
        return self._first_good(which, lambda step: self._read(step, target))

    def read_meta(self, which: str = "latest") -> dict[str, Any]:
        """The `meta` that `restore` would return, unless the arrays are damaged."""
        return self._first_good(which, self._read_meta)

    def find(self, which: str) -> int:
        """The step of "latest", "best" or a step's number."""
        steps = self.steps()
        if not steps and (self._damaged or any(self._directory.glob("damaged-[0-9]*"))):
            raise CheckpointError(
                f"{self._directory}: none of the checkpoints can be read; they are kept as "
                "damaged-*; restore a copy of them, or start again in another --workdir"
            )
        if not steps:
            raise CheckpointError(f"{self._directory} holds no checkpoint: train first")
        named = {str(step): step for step in steps} | {"latest": steps[-1], "best": self._best()}
        if which not in named:
            raise CheckpointError(f"{self._directory} has no checkpoint {which}: there are {steps}")
        if named[which] is None:
            raise CheckpointError(f"{self._directory}: no checkpoint was validated yet")
        return named[which]

    def _first_good(self, which: str, read: Callable[[int], Any]) -> Any:
        while True:
            step = self.find(which)
            try:
                return read(step)
            except _Damaged as damage:
                if which not in self._passes_over:
                    message = f"{damage}; choose another of {self.steps()}"
                    raise CheckpointError(message) from damage
                done = f"renamed to damaged-{step}" if self._writes else "skipped"
                logging.warning("%s; %s", damage, done)
                self._damaged.add(step)
                with self._saving():
                    self._set_aside(step)

    def _best(self) -> int | None:
        scored = [(self._scores[step], step) for step in self.steps() if self._scores.get(step)]
        ranks = [(s.get("top1", -s.get("loss", math.inf)), step) for s, step in scored]
        return max(ranks, default=(0, None))[1]

    def _read(self, step: int, target: Any) -> tuple[Any, dict[str, Any]]:
        """A checkpoint is good for all processes or for none, so that they go on with the same."""
        path, wanted, failed = self._path(step), _named_leaves(target), (0, "")
        try:
            meta = self._read_meta(step)
            saved = meta.pop("leaves")
            _check_same(path, saved, wanted)
            # Orbax's checkpointer would wait for processes that failed; its handler does not.
            args = ocp.args.StandardRestore(wanted)
            leaves = ocp.StandardCheckpointHandler().restore(_Path(path / "state"), args=args)
            for name, leaf in leaves.items():
                if not _is_as_saved(leaf, saved[name]["sha256"]):
                    raise ValueError(f"the bytes of {name} are not those saved")
        except Exception as error:
            failure = _blame(path, error)
            failed = (1 if isinstance(failure, _Damaged) else 2, str(failure))
        worst, text = max(_of_all_processes(failed))
        if worst:
            raise (_Damaged if worst == 1 else CheckpointError)(text)
        return jax.tree.unflatten(jax.tree.structure(target), [leaves[n] for n in wanted]), meta

    def _read_meta(self, step: int) -> dict[str, Any]:
        try:
            meta = json.loads((self._path(step) / "meta" / "metadata").read_bytes())
            if meta.pop("sha256", None) not in (None, _hash_json(meta)):  # older runs have none
                raise ValueError("its meta is not what was saved")
            return meta
        except Exception as error:
            raise _blame(self._path(step), error) from error

    def _read_scores(self) -> dict[int, dict[str, float]]:
        try:
            content = json.loads(self._scores_path.read_bytes())
            return {int(step): _finite(metrics) for step, metrics in content.items()}
        except FileNotFoundError:
            scores = {}
            for step in self.steps():  # an older run has each score in its checkpoint
                with contextlib.suppress(Exception):
                    metrics = json.loads((self._path(step) / "metrics" / "metrics").read_bytes())
                    scores[step] = _finite(metrics)
            return scores
        except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError):
            logging.warning("%s is damaged: no step counts as validated", self._scores_path)
            return {}

    def _write_scores(self) -> None:
        with self._saving():
            scores = {str(step): score for step, score in sorted(self._scores.items())}
            write_json(self._scores_path, scores)

    def _path(self, step: int) -> Path:
        return self._directory / str(step)

    def _set_aside(self, name: int | str) -> None:
        """Takes it out of the run, in the place of an earlier one of that name."""
        path, aside = self._directory / str(name), self._directory / f"damaged-{name}"
        if self._writes and os.path.lexists(path):
            _remove(aside)
            path.rename(aside)

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise CheckpointError(
                f"{self._directory}: saving failed ({first_line(error)}); earlier checkpoints are "
                "intact: free some space or mend the disk, and run the same command again"
            ) from error


class _Damaged(CheckpointError):
    """One checkpoint cannot be used; another may."""


class _Path(PosixGPath):
    """A path whose own characters, such as brackets, are no pattern where orbax globs below it."""

    def glob(self, pattern: str) -> Iterator["_Path"]:
        return map(type(self), Path(self).glob(pattern))


def _blame(path: Path, error: BaseException) -> CheckpointError:
    """`_Damaged`, unless the machine failed to read what may be good."""
    if isinstance(error, CheckpointError):
        return error
    while error.__cause__ is not None:
        error = error.__cause__
    for failure in (error, _unreadable(path)):
        told = re.search(r"os_error_code='(\d+)'", str(failure))  # by tensorstore
        code = int(told[1]) if told else getattr(failure, "errno", None)
        memory = isinstance(failure, MemoryError) or "RESOURCE_EXHAUSTED" in str(failure)
        if memory or code not in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            return CheckpointError(
                f"{path} could not be read ({first_line(failure)}) and is left as it is: run the "
                "same command again when it can be read"
            )
    return _Damaged(f"{first_line(error)}: {path} is damaged or was never finished")


def _unreadable(path: Path) -> OSError | None:
    """Why a file or folder cannot be opened, which orbax takes for missing."""

    def fail(error: OSError) -> None:
        raise error

    try:
        for folder, _, names in os.walk(path, onerror=fail):
            for name in names:
                open(os.path.join(folder, name), "rb").close()
    except OSError as error:
        return error
    return None


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """{"params.Conv_0.kernel": array, ...} in the order of the tree's leaves."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def _is_split(leaf: jax.Array | np.ndarray) -> bool:
    return isinstance(leaf, jax.Array) and not leaf.is_fully_replicated


def _describe(leaves: dict[str, jax.Array | np.ndarray]) -> dict[str, Any]:
    """Shape, dtype and {ranges: SHA-256} of each; a process hashes the parts that it holds."""
    described = {
        name: {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "sha256": {ranges: _hash(part) for ranges, part in _parts(leaf).items()},
        }
        for name, leaf in leaves.items()
    }
    for others in _of_all_processes(described):
        for name, other in others.items():
            described[name]["sha256"] |= other["sha256"]
    return described


def _parts(leaf: jax.Array | np.ndarray) -> dict[str, Any]:
    """What this process holds, by ranges of indices: the whole is "[]", rows 3 and 4 "[[3, 5]]"."""
    if not _is_split(leaf):
        return {"[]": leaf}
    ranges = lambda index: json.dumps([s.indices(n)[:2] for s, n in zip(index, leaf.shape)])
    return {ranges(shard.index): shard.data for shard in leaf.addressable_shards}


def _is_as_saved(leaf: jax.Array, digests: dict[str, str] | str) -> bool:
    """Whether what this process holds has the digests saved, as far as parts are cut the same."""
    if isinstance(digests, str):  # an older run's, of the whole
        digests = {"[]": digests}
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        whole = np.asarray(leaf)
        parts = {r: whole[tuple(slice(*ends) for ends in json.loads(r))] for r in digests}
    else:
        parts = _parts(leaf)
    return all(_hash(part) == digests[r] for r, part in parts.items() if r in digests)


def _hash(array: jax.Array | np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()


def _hash_json(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _of_all_processes(value: Any) -> list[Any]:
    """The JSON values that the processes give."""
    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value).encode()
    length = int(np.max(process_allgather(np.int32(len(text)))))
    rows = process_allgather(np.frombuffer(text.ljust(length), np.uint8))
    return [json.loads(row.tobytes()) for row in rows]


def _check_same(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in sorted(saved.keys() | wanted.keys()):
        was, now = saved.get(name), wanted.get(name)
        was = f"{was['dtype']}{was['shape']}" if was else "nothing"
        now = f"{now.dtype}{list(now.shape)}" if now is not None else "nothing"
        if was != now:
            raise CheckpointError(
                f"{path} is of another model: {name} was saved as {was}, expected is {now}; "
                "use the config, the data and the commit that it was trained with, or another "
                "--workdir"
            )
