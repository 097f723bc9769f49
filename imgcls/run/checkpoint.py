"""Checkpoints of a run: saved in the background, committed by one rename, verified when read.

The only module that knows orbax. A checkpoint is a directory `<step>/` with the arrays and `meta`,
a JSON object that has the SHA-256 of every array, too. Validation scores are in `validation.json`,
because a step may be validated after it was saved. The first checkpoint of a run is read back
before it is committed, so that a place where nothing can be read is noticed at once.
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from imgcls.errors import CheckpointError, UserError, first_line
from imgcls.parallel import is_main, of_all_processes
from imgcls.run.logs import figures_of, read_metrics
from imgcls.run.workdir import write_json

# Orbax warns of what is meant here, and prints the traceback of errors that become ours.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


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
        self._damaged: set[int] = set()
        self._to_read_back: int | None = None
        misread = re.search(r"[\\*?[\ud800-\udfff]|gs:/", str(self._directory))
        if misread or (self._writes and directory.is_symlink()):
            why = f"orbax misreads {misread[0]!r} in a path" if misread else "it is a link"
            told = f"{str(directory)!r} cannot hold checkpoints, because {why}"
            raise UserError(f"{told}: use another --workdir")
        # Created in the background, a directory that cannot be made would hang the exit.
        options = ocp.AsyncOptions(
            create_directories_asynchronously=False, post_finalization_callback=self._read_back
        )
        self._saver = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
        with self._guarded("opening"):
            if self._writes:
                self._directory.mkdir(parents=True, exist_ok=True)
                for unfinished in self._directory.glob("[0-9]*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(unfinished, ignore_errors=True)  # what a kill left of a save
                    unfinished.unlink(missing_ok=True)  # or a stray file of such a name
            self._scores = self._read_scores()
        if not read_only and self._had_some():
            self.find("latest")  # or the error that there is none

    @property
    def validated_step(self) -> int:
        """The last step that was validated, up to the restored one; 0 if none was."""
        return max(self._scores, default=0)

    def steps(self) -> list[int]:
        """The steps saved, oldest first; not every one need be good."""
        paths = self._directory.iterdir() if self._directory.exists() else ()
        names = [path.name for path in paths if path.is_dir() and not path.is_symlink()]
        return sorted({int(n) for n in names if re.fullmatch("0|[1-9][0-9]*", n)} - self._damaged)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Saves in the background, once the save before is committed.

        Args:
            step: the number of batches seen.
            state: a pytree of arrays. They may be donated at once: XLA does not reuse a buffer that
                is still read on a CPU, and those of other devices are copied first.
            meta: what else to keep, in JSON types.
        """
        self.wait()
        # Whole arrays as numpy's, because orbax would compile slices of them, one per device.
        leaves = {name: _as_held(leaf) for name, leaf in _named_leaves(state).items()}
        # A copy, because the caller's may change while it is being written.
        meta = json.loads(json.dumps(meta | {"leaves": _describe(leaves)}))
        meta["sha256"] = _hash_json(meta)
        arguments = {"state": ocp.args.StandardSave(leaves), "meta": ocp.args.JsonSave(meta)}
        with self._guarded("saving"):
            self._damaged.discard(step)
            self._to_read_back = None if self.steps() else step
            self._saver.save(self._path(step), args=ocp.args.Composite(**arguments))

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Keeps the validation metrics of a step, which decide which checkpoint is the best."""
        self._write_scores(self._scores | {step: _finite(metrics)})

    def since_best(self) -> tuple[int, int]:
        """The first of the best validated steps, and how many were validated after it."""
        ranks = _ranks(self._scores)
        best = max(ranks, key=lambda s: (ranks[s], -s), default=0)
        return best, sum(s > best for s in ranks)

    def wait(self) -> None:
        """Returns when the last save is committed. Then deletes what need not be kept."""
        with self._guarded("saving"):
            self._saver.wait_until_finished()
            steps = self.steps() if self._writes else []
            for step in set(steps) - {*steps[-2:], self._best(steps)}:
                # Renamed first, so that a kill leaves no half of a checkpoint.
                unwanted = self._path(step).with_suffix(".orbax-checkpoint-tmp-unwanted")
                shutil.rmtree(self._path(step).rename(unwanted))

    def close(self) -> None:
        self.wait()
        self._saver.close()

    def restore_latest(self, target: Any) -> tuple[Any, dict[str, Any]]:
        """Restores "latest", and drops the scores of later steps, because those come again."""
        state, meta = self.restore("latest", target)
        meta.pop("in_place_of", None)  # its steps come again
        if validated := meta.pop("validated_step", 0):  # older runs have it here
            self._scores.setdefault(validated, {})
        latest = self.find("latest")
        if self.validated_step > latest:
            self._write_scores({s: score for s, score in self._scores.items() if s <= latest})
        return state, meta

    def restore(self, which: str, target: Any) -> tuple[Any, dict[str, Any]]:
        """The checkpoint `which`: the state, and the `meta` that was saved with it.

        In the place of a damaged "latest" or "best" the next one is used, with a warning, and
        `meta["in_place_of"]` is the step of the one wanted. The damaged one is renamed, unless
        `read_only`.

        Args:
            which: "latest", "best" or a step.
            target: a pytree of `jax.ShapeDtypeStruct`s that say where each array shall live.
        """
        state, meta = self._first_good(which, partial(self._read, target=target))
        every = {*self.steps(), *self._damaged}
        wanted = {"latest": max(every), "best": self._best(self._scores)}.get(which)
        used = self.find(which)
        return state, meta | ({} if wanted in (None, used) else {"in_place_of": wanted})

    def read_meta(self, which: str = "latest") -> dict[str, Any]:
        """The `meta` that was saved with a checkpoint; of damaged ones as `restore`."""
        return self._first_good(which, lambda step: _read_meta(self._path(step)))

    def _first_good(self, which: str, read: Callable[[int], Any]) -> Any:
        while True:
            step = self.find(which)
            try:
                return read(step)
            except _Damaged as damage:
                if which not in ("latest", "best"):
                    message = f"{damage}; choose another of {self.steps()}"
                    raise CheckpointError(message) from damage
                done = f"renamed to damaged-{step}" if self._writes else "skipped"
                logging.warning("%s; %s", damage, done)
                self._damaged.add(step)
                if self._writes:
                    with self._guarded("renaming"):
                        aside = self._directory / f"damaged-{step}"
                        shutil.rmtree(aside, ignore_errors=True)  # an earlier one
                        aside.unlink(missing_ok=True)
                        self._path(step).rename(aside)

    def find(self, which: str) -> int:
        """The step of "latest", "best" or a step's number."""
        steps = self.steps()
        if not steps and self._had_some():
            raise CheckpointError(
                f"{self._directory}: none of the checkpoints is there and whole (damaged ones are "
                "kept as damaged-*): restore a copy of them, or start again in another --workdir"
            )
        if not steps:
            raise CheckpointError(f"{self._directory} holds no checkpoint: train first")
        named: dict[str, int | None] = {"latest": steps[-1], "best": self._best(steps)}
        named |= {str(step): step for step in steps}
        if which not in named:
            kind = CheckpointError if which.isdecimal() else UserError
            there = ", ".join(name for name, step in named.items() if step is not None)
            raise kind(f"{self._directory} has no checkpoint {which}: there are {there}")
        if (step := named[which]) is None:
            raise CheckpointError(f"{self._directory}: no checkpoint was validated yet")
        return step

    def _best(self, steps: Iterable[int]) -> int | None:
        ranks = _ranks({step: self._scores.get(step, {}) for step in steps})
        return max(ranks, key=lambda s: (ranks[s], s), default=None)

    def _read(self, step: int, target: Any) -> tuple[Any, dict[str, Any]]:
        """A checkpoint is good for all processes or for none, so that they go on with the same."""
        path, wanted, failed = self._path(step), _named_leaves(target), (0, "")
        try:
            leaves, meta = _load(path, wanted)
        except Exception as error:
            failure = _blame(path, error)
            failed = (1 if isinstance(failure, _Damaged) else 2, str(failure))
        worst, text = max(of_all_processes(failed))
        if worst:
            raise (_Damaged if worst == 1 else CheckpointError)(text)
        return jax.tree.unflatten(jax.tree.structure(target), [leaves[n] for n in wanted]), meta

    def _read_back(self) -> None:
        """Called by orbax in process 0, in the thread that saves, before the save is committed."""
        if self._to_read_back is not None:
            try:
                _load(
                    self._path(self._to_read_back).with_suffix(".orbax-checkpoint-tmp"), wanted={}
                )
            except Exception as error:
                raise RuntimeError(f"what was saved cannot be read: {first_line(error)}") from error

    def _read_scores(self) -> dict[int, dict[str, float]]:
        if not self.steps():  # a kill may have left scores without the first checkpoint
            return {}
        try:
            saved = json.loads(self._scores_path.read_bytes())
            return {int(step): _finite(metrics) for step, metrics in saved.items()}
        except FileNotFoundError:  # as in older runs
            pass
        except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError):
            logging.warning("%s is damaged: the scores are those logged", self._scores_path)
        rows = read_metrics(self._directory.with_name("metrics.jsonl"))
        rows = [row for row in rows if row["split"] == "validation"]
        return {row["step"]: _finite({key: row[key] for key in figures_of(row)}) for row in rows}

    def _write_scores(self, scores: dict[int, dict[str, float]]) -> None:
        self._scores = scores
        with self._guarded("saving"):
            write_json(self._scores_path, {str(step): scores[step] for step in sorted(scores)})

    def _path(self, step: int) -> Path:
        return self._directory / str(step)

    def _had_some(self) -> bool:
        evaluated = self._directory.with_name("results.json").exists()
        return bool(self._damaged) or evaluated or any(self._directory.glob("damaged-[0-9]*"))

    @contextlib.contextmanager
    def _guarded(self, doing: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise CheckpointError(
                f"{self._directory}: {doing} failed ({first_line(error)}); earlier checkpoints are "
                "intact: free some space or mend the disk, and run the same command again"
            ) from error


def _ranks(scores: dict[int, dict[str, float]]) -> dict[int, float]:
    return {s: m.get("top1", -m.get("loss", math.inf)) for s, m in scores.items() if m}


class _Damaged(CheckpointError):
    """One checkpoint cannot be used; another may."""


def _blame(path: Path, error: BaseException) -> CheckpointError:
    """`_Damaged`, unless the machine failed to read what may be good."""
    if isinstance(error, CheckpointError):
        return error
    while error.__cause__ is not None:
        error = error.__cause__
    told, why = re.search(r"os_error_code='(\d+)'", str(error)), first_line(error)
    code = int(told[1]) if told else getattr(error, "errno", None)  # told by tensorstore
    memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
    if not memory and code in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return _Damaged(f"{why}: {path} is damaged or was never finished")
    left = "is left as it is: run the same command again when it can be read"
    return CheckpointError(f"{path} could not be read ({why}) and {left}")


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads((path / "meta/metadata").read_bytes())
        if meta.pop("sha256", None) not in (None, _hash_json(meta)):  # older runs have none
            raise ValueError("its meta is not what was saved")
        return meta
    except Exception as error:
        raise _blame(path, error) from error


def _load(path: Path, wanted: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The leaves of a checkpoint and its meta, verified. As numpy's if none are `wanted`."""
    meta = _read_meta(path)
    saved = meta.pop("leaves")
    empty = lambda leaf: np.broadcast_to(np.zeros((), leaf["dtype"]), leaf["shape"])
    wanted = wanted or {name: empty(leaf) for name, leaf in saved.items()}
    _check_same(path, saved, wanted)
    # Orbax's checkpointer would wait for processes that failed; its handler does not.
    args = ocp.args.StandardRestore(wanted)
    leaves = ocp.StandardCheckpointHandler().restore(path / "state", args=args)
    for name, leaf in leaves.items():
        digests = saved[name]["sha256"]
        digests = {"[]": digests} if isinstance(digests, str) else digests  # older runs
        if any(digests.get(r, h) != h for r, h in _hashes(leaf, digests).items()):
            raise ValueError(f"the bytes of {name} are not those saved")
    return leaves, meta


def _finite(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {k: float(v) for k, v in metrics.items() if v is not None and math.isfinite(v)}


def _named_leaves(tree: Any) -> dict[str, Any]:
    """{"params.Conv_0.kernel": array, ...} in the order of the tree's leaves."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def _as_held(leaf: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """As numpy's where this process holds all of it."""
    whole = isinstance(leaf, np.ndarray) or leaf.is_fully_addressable or leaf.is_fully_replicated
    return np.asarray(leaf) if whole else leaf


def _describe(leaves: dict[str, jax.Array | np.ndarray]) -> dict[str, Any]:
    """Shape, dtype and {ranges: SHA-256} of each; a process hashes the parts that it holds."""
    hashes = of_all_processes({name: _hashes(leaf) for name, leaf in leaves.items()})
    merged = lambda name: {r: h for own in hashes for r, h in own[name].items()}
    return {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sha256": merged(name)}
        for name, leaf in leaves.items()
    }


def _hashes(leaf: jax.Array | np.ndarray, ranges: Iterable[str] = ("[]",)) -> dict[str, str]:
    """{ranges of indices: SHA-256} of what this process holds: its shards, or `ranges` of all.

    The whole is "[]", rows 3 and 4 are "[[3, 5]]".
    """
    leaf = _as_held(leaf)
    if isinstance(leaf, np.ndarray):
        parts = {r: leaf[tuple(slice(*ends) for ends in json.loads(r))] for r in ranges}
    else:
        name = lambda index: json.dumps([s.indices(n)[:2] for s, n in zip(index, leaf.shape)])
        parts = {name(shard.index): np.asarray(shard.data) for shard in leaf.addressable_shards}
    contents = {r: np.ascontiguousarray(part).view(np.uint8).data for r, part in parts.items()}
    return {r: hashlib.sha256(content).hexdigest() for r, content in contents.items()}


def _hash_json(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _check_same(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    was = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in saved.items()}
    now = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in wanted.items()}
    for name, _ in sorted(was.items() ^ now.items()):
        raise CheckpointError(
            f"{path} is of another model: {name} was saved as {was.get(name, 'nothing')}, expected "
            f"is {now.get(name, 'nothing')}; use the config, the data and the commit that it was "
            "trained with, or another --workdir"
        )
