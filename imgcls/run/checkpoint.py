"""Checkpoints of a run: saved in the background, committed by one rename, verified when read.

The only module that knows orbax. A checkpoint is a directory `<step>/` with the arrays and a JSON
object, in which every array's SHA-256, shape and dtype stand beside what the loop wants to keep.
"""

import hashlib
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental.multihost_utils import sync_global_devices
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from imgcls.errors import CheckpointError, first_line
from imgcls.parallel import is_main


def _top1(metrics: dict[str, Any]) -> float:
    return -math.inf if math.isnan(metrics["top1"]) else metrics["top1"]


class Checkpoints:
    """The checkpoints in one directory.

    Kept are the latest two, the second as a way out should the latest be damaged, and the one with
    the best validation top-1. Errors of saving and reading are `CheckpointError`.
    """

    def __init__(self, directory: Path, *, read_only: bool = False):
        self._directory = directory.absolute()  # orbax refuses relative paths
        self._writes = not read_only and is_main()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep.AnyPreservationPolicy(
                [
                    keep.LatestN(2),
                    # A NaN must never count as the best, nor delete it.
                    keep.BestN(get_metric_fn=_top1, n=1, keep_checkpoints_without_metrics=False),
                ]
            ),
            best_fn=_top1,
            read_only=read_only,
            # Created in the background, a directory that cannot be made would hang the exit.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        try:
            if self._writes:
                # What a kill left of a save. Orbax would remove it in the background, where it
                # may meet the next save of the same step.
                for unfinished in self._directory.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(unfinished)
                self._drop_replaced()
            self._manager = ocp.CheckpointManager(
                self._directory, options=options, item_names=("state", "meta")
            )
        except Exception as error:
            raise CheckpointError(f"{directory} cannot be opened: {first_line(error)}") from error

    def steps(self) -> list[int]:
        """The steps saved, oldest first; not every one need be good."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, state: Any, meta: dict[str, Any], *, top1: float | None = None
    ) -> None:
        """Saves in the background, over an earlier save of the same step.

        Args:
            step: the number of batches seen.
            state: a pytree of arrays. It is copied first: the caller may donate it at once.
            meta: what else to keep, in JSON types.
            top1: validation accuracy of this very state, if known.
        """
        self.wait()
        leaves = {name: np.array(leaf) for name, leaf in _named_leaves(state).items()}
        described = {name: _describe(leaf) for name, leaf in leaves.items()}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves),
            meta=ocp.args.JsonSave({**meta, "leaves": described}),
        )
        try:
            if step in self._manager.all_steps():
                self._rename(step, f"replaced.{step}")  # it stays until the new one is whole
            metrics = None if top1 is None else {"top1": top1}
            self._manager.save(step, args=items, metrics=metrics, force=True)
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Returns when the last save is committed."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            if self._writes:
                self._drop_replaced()
        except Exception as error:
            raise self._failed(error) from error

    def restore_latest(self, target: Any) -> tuple[Any, dict[str, Any]]:
        """The newest good checkpoint; a damaged newer one is renamed aside, with a warning."""
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self._read(step, target)
            except _Damaged as damage:
                aside = f"damaged-{step}"
                logging.warning("%s; renamed to %s", damage, aside)
                self._rename(step, aside)
        raise CheckpointError(
            f"{self._directory}: none of the checkpoints {steps} can be read; they are kept as "
            "damaged-*; restore a copy of them, or start again in another --workdir"
        )

    def restore(self, which: str, target: Any) -> tuple[Any, dict[str, Any]]:
        """The checkpoint `which`: "latest", "best" or a step.

        Args:
            which: as above.
            target: a pytree of `jax.ShapeDtypeStruct`s that say where each array shall live.

        Returns:
            The state, and the `meta` that was saved with it.
        """
        try:
            return self._read(self.find(which), target)
        except _Damaged as damage:
            raise CheckpointError(f"{damage}; choose another of {self.steps()}") from None

    def find(self, which: str) -> int:
        """The step of "latest", "best" or a step's number."""
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self._directory} holds no checkpoint: train first")
        if which == "latest":
            return steps[-1]
        if which == "best":
            best = self._manager.best_step()
            if best is None:
                raise CheckpointError(f"{self._directory}: no checkpoint was validated yet")
            return best
        if not which.isdecimal() or int(which) not in steps:
            raise CheckpointError(f"{self._directory} has no checkpoint {which}: there are {steps}")
        return int(which)

    def read_meta(self, which: str = "latest") -> dict[str, Any]:
        step = self.find(which)
        try:
            return self._manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            ).meta
        except Exception as error:
            raise CheckpointError(
                f"{self._directory}/{step} is damaged: {first_line(error)}"
            ) from error

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def _drop_replaced(self) -> None:
        """Removes what a finished save replaced; puts it back where the save came to nothing."""
        for replaced in self._directory.glob("replaced.*"):
            step = self._directory / replaced.suffix[1:]
            shutil.rmtree(replaced) if step.exists() else replaced.rename(step)

    def _rename(self, step: int, name: str) -> None:
        """Takes a checkpoint out of the run, in the place of an earlier one of that name."""
        if is_main():
            shutil.rmtree(self._directory / name, ignore_errors=True)
            (self._directory / str(step)).rename(self._directory / name)
        sync_global_devices(name)
        self._manager.reload()

    def _read(self, step: int, target: Any) -> tuple[Any, dict[str, Any]]:
        path = self._directory / str(step)
        try:
            meta = self.read_meta(str(step))
            saved = meta.pop("leaves")
        except (CheckpointError, KeyError) as error:
            raise _Damaged(f"{path} is damaged or was never finished") from error
        wanted = _named_leaves(target)
        _check_same(path, saved, wanted)
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
            leaves = self._manager.restore(step, args=args).state
        except Exception as error:
            raise _Damaged(f"{path} is damaged ({first_line(error)})") from error
        for name, leaf in leaves.items():
            if _describe(np.asarray(leaf))["sha256"] != saved[name]["sha256"]:
                raise _Damaged(f"{path} is damaged: the bytes of {name} are not those saved")
        return jax.tree.unflatten(jax.tree.structure(target), [leaves[n] for n in wanted]), meta

    def _failed(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self._directory}: saving failed ({first_line(error)}); earlier checkpoints are "
            "intact: free some space or mend the disk, and run the same command again"
        )


class _Damaged(Exception):
    """One checkpoint cannot be used; another may."""


def _named_leaves(tree: Any) -> dict[str, Any]:
    """{"params.Conv_0.kernel": array, ...} in the order of the tree's leaves."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def _describe(leaf: np.ndarray) -> dict[str, Any]:
    digest = hashlib.sha256(np.ascontiguousarray(leaf).view(np.uint8).data).hexdigest()
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sha256": digest}


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
