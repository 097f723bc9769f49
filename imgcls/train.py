"""Training: from the last checkpoint in a workdir, if any, to the end and the test split."""

import contextlib
import os
import shlex
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from imgcls import config as configs
from imgcls import pretrained
from imgcls.data import record
from imgcls.data.splits import Split
from imgcls.data.summary import describe
from imgcls.errors import CheckpointError, DivergedError, UserError
from imgcls.evaluation.evaluate import evaluate, is_evaluated
from imgcls.evaluation.report import SAMPLES
from imgcls.experiment import Experiment, load_config
from imgcls.features import kept_features
from imgcls.inference.classifier import Classifier
from imgcls.parallel import is_main
from imgcls.run import files, machine, processes, signals
from imgcls.run.checkpoint import Checkpoints
from imgcls.run.logs import (
    Clock,
    MetricWindow,
    MetricWriter,
    add_sums,
    image_grid,
    mean_metrics,
    progress,
    say,
)
from imgcls.run.processes import Agreement
from imgcls.run.signals import StopSignal, in_thread, interruptibly
from imgcls.run.workdir import claim, write_json
from imgcls.state import TrainState, count_parameters
from imgcls.task import Task

STEPS_AHEAD = 2  # batches given to the device before the first of them is waited for
Callback = Callable[[dict[str, Any]], bool | None]


class Run(NamedTuple):
    """What every phase of a run needs."""

    exp: Experiment
    workdir: Path
    checkpoints: Checkpoints
    stop_agreed: Agreement


class Log(NamedTuple):
    """What a session writes and shows of its training."""

    writer: MetricWriter
    window: MetricWindow
    clock: Clock
    bar: tqdm


def train_and_evaluate(
    config: ConfigDict,
    workdir: str | Path,
    *,
    task: Task | None = None,
    splits: dict[str, Split] | None = None,
    callback: Callback = lambda row: None,
    until_epoch: int | None = None,
    test: bool = True,
) -> TrainState:
    """Trains to the end, from the last checkpoint in `workdir` if any, and evaluates on test.

    Args:
        config: of the run.
        workdir: of the run.
        task: in the place of the one that the config names.
        splits: "train", "test" and perhaps "validation", in the place of the config's.
        callback: called with each row of metrics.jsonl. Training is saved and left where it
            returns True; a later call goes on.
        until_epoch: training is saved and left after this epoch; a later call goes on.
        test: False leaves the test split unopened; a later call evaluates.

    Returns:
        The state at the step where it stopped.

    Raises:
        UserError, DivergedError, CheckpointError, Stopped: see `imgcls.errors`.
    """
    workdir = Path(os.path.expanduser(workdir))
    machine.start()
    facts = {"config": config, **machine.describe(), "device": ""}  # devices may differ
    processes.check_same(lambda: configs.flatten(facts) | {"config.data.dir": ""})
    configs.validate(config)
    if (workdir / "sweep.json").exists():
        raise UserError(f"{workdir} holds a sweep, not a run: use another --workdir")
    with StopSignal() as stop, claim(workdir):
        checkpoints, weights = Checkpoints(workdir / "checkpoints"), None
        if checkpoints.steps():  # older ones are without a config
            saved = checkpoints.read_meta().get("config")
            began = configs.from_json(saved) if saved else load_config(workdir)
            config = configs.completed(config, configs.flatten(began))
            configs.check_resumable(began, config, workdir)
        else:
            config, weights = interruptibly(partial(pretrained.prepare, config))
        exp = Experiment(config, task=task, splits=splits, test=test)
        config = exp.config
        run = Run(exp, workdir, checkpoints, Agreement(stop, delay=STEPS_AHEAD))
        state, meta = start_or_resume(run, weights)
        meta["config"] = configs.to_json(config)
        epochs = min(n for n in (until_epoch, config.train.epochs) if n is not None)
        try:
            write_json(workdir / "config.json", meta["config"])
            record.keep(workdir, exp.splits, anew=not checkpoints.steps())
            state, meta = train(run, state, meta, callback, epochs * exp.steps_per_epoch)
            if test and (int(state.step) == exp.total_steps or "stopped_early" in meta):
                open_test(run, state, meta)
                say(f"open {workdir / 'report.html'}, or see what it says of your own pictures:")
                run_flag = shlex.quote(f"--workdir={workdir}")
                say(f"python -m imgcls predict {run_flag} FILE_OR_FOLDER")
        except OSError as error:  # a full disk; checkpoints tell of theirs themselves
            raise CheckpointError(
                f"{workdir} cannot be used ({error.strerror}); saved checkpoints are intact: "
                "free some space and run the same command again"
            ) from error
        checkpoints.close()
        return state


def start_or_resume(run: Run, weights: Any = None) -> tuple[TrainState, dict[str, Any]]:
    """The first or the last saved state, and `meta`: what is saved with it, in JSON types."""
    exp = run.exp
    splits = interruptibly(lambda: exp.splits)
    processes.check_same(lambda: {f"the {n} split": s.fingerprint for n, s in splits.items()})
    for name, split in splits.items():
        say(f"{name}: {len(split)} examples, {exp.config.data.name} {split.name}")
    if "validation" not in splits:
        say("validation: none, config.data.validation is empty")
    total_steps, c = exp.total_steps, exp.config.train  # or the reason why there are none
    if c.steps and abs(total_steps - c.steps) > exp.steps_per_epoch:
        say(f"config.train.epochs={c.epochs} makes {total_steps} steps, not {c.steps}")
    weighted = exp.config.task.get("class_weights", "none") != "none"
    found = interruptibly(lambda: describe(splits, weighted=weighted))
    say("\n".join(found))
    meta = {
        "class_names": list(exp.class_names),
        "train_examples": len(splits["train"]),
        "data": found,
        "trained_by": machine.trained_by(),  # where and with what the run was started
        "cpu_kernels": sorted(exp.ops),
        "bits": exp.reproducibility_facts(),
        "seconds": 0.0,  # since the first start, all sessions together
        "train_seconds": 0.0,  # of them, in training steps
        "sums": None,  # of the log window that the save interrupted
        "bad_steps": [],
    }
    signals.poll()
    resumed = bool(run.checkpoints.steps())
    if resumed:
        state, saved = run.checkpoints.restore_latest(exp.state_target())
        changed = [k for k in ("class_names", "train_examples") if saved[k] != meta[k]]
        if "class_names" not in changed:
            record.check(run.workdir, splits)  # which tells more than the number of examples
        for key in changed:
            raise UserError(
                f"the data changed since {run.workdir} was started ({key}: {saved[key]} then, "
                f"{meta[key]} now): restore it, or use another --workdir"
            )
        exp.keep_ops(saved["cpu_kernels"])
        bits = exp.reproducibility_facts(saved.get("bits"))
        machine.check_reproducible(saved.get("bits", {}), bits)
        by = machine.trained_by(saved.get("trained_by"))
        meta = saved | {"cpu_kernels": sorted(exp.ops), "bits": bits, "trained_by": by}
        meta["data"] = found
    else:
        state = interruptibly(interruptibly(exp.compile_init))
        if weights:
            state, meta["init_from"] = pretrained.take_over(state, weights, exp)
    found += pretrained.told(meta)
    model, dtype = exp.config.model, exp.model.dtype.name
    dtype += f" (no fast {model.dtype} on this CPU)" if dtype != model.dtype else ""
    device = machine.describe()["device"] + ", convolutions by oneDNN" * ("conv" in exp.ops)
    say(f"{model.name}: {count_parameters(state.params):,} parameters, {dtype}, {device}")
    if resumed:
        say(f"resumed at step {int(state.step)} of {total_steps}")
    signals.poll()
    return state, meta


def train(
    run: Run, state: TrainState, meta: dict[str, Any], callback: Callback, last_step: int
) -> tuple[TrainState, dict[str, Any]]:
    """From the step of `state` to `last_step`, or to where the callback or patience ends it.

    Between two steps it logs, validates, saves and stops.
    """
    exp, workdir, checkpoints, stop_agreed = run
    c, step = exp.config.train, int(state.step)
    saved_step = step if checkpoints.steps() else -1
    period = exp.steps_per_epoch * c.validate_every_epochs
    log_every = c.log_every_steps or min(20, period // 4) or 1

    def validation_due() -> bool:
        epoch, rest = divmod(step, exp.steps_per_epoch)
        due = (rest == 0 and epoch % c.validate_every_epochs == 0) or step == exp.total_steps
        return due and "validation" in exp.splits and step > checkpoints.validated_step

    def out_of_patience() -> bool:
        best, since = checkpoints.since_best()
        if out := 0 < c.patience <= since and step < exp.total_steps:
            meta["stopped_early"] = {"step": step, "best_step": best}
            say(f"stopped early: no better validation since that of step {best}")
        return out

    if (step >= last_step and not validation_due()) or out_of_patience():
        return state, meta
    train_step, eval_step = compile_steps(exp, state)
    writer = MetricWriter(workdir, start_step=step, validated_step=checkpoints.validated_step)
    bar = progress(exp.total_steps, "training", "steps", initial=step)
    with contextlib.closing(writer), bar as bar:
        window = MetricWindow(meta["sums"], meta["bad_steps"])
        clock = Clock(meta["seconds"], meta["train_seconds"])
        log = Log(writer, window, clock, bar)
        stop = enough = False
        while True:
            validated = None
            if clock.steps and (step % log_every == 0 or step == exp.total_steps):
                sums, rate = check_finite(run, window), clock.steps_per_second() * c.batch_size
                enough = callback(log_row(exp, log, step, "train", sums, rate))
                window.sums = {}
            if validation_due():
                check_finite(run, window)
                clock.lap()
                sums = validate(run, eval_step, state)
                if sums is not None:  # else a stop signal came first
                    rate, validated = sums["count"] / clock.pause(), mean_metrics(sums)
                    enough = callback(log_row(exp, log, step, "validation", sums, rate)) or enough
            stop = stop_agreed()
            enough = enough or step >= last_step
            epoch, rest = divmod(step, exp.steps_per_epoch)
            every = c.checkpoint_every_epochs or c.validate_every_epochs
            save = rest == 0 and epoch > 0 and epoch % every == 0
            if (validated or save or stop or enough) and step > saved_step:
                meta |= {"sums": check_finite(run, window), "bad_steps": window.bad_steps}
                clock.lap()
                meta |= {"seconds": clock.seconds, "train_seconds": clock.train_seconds}
                checkpoints.save(step, state, meta)
                saved_step = step
                clock.pause()
            if validated:
                checkpoints.record(step, validated if exp.may_be_best(step) else {})
                enough = enough or out_of_patience()
            if stop or enough:
                break
            state, metrics = train_step(step)(state, exp.train_batch(step), exp.rng)
            if step == 0 and is_main():
                write_samples(run, writer)  # while the device computes
            step, clock.steps = step + 1, clock.steps + 1
            window.add(step, metrics)
            window.wait(ahead=STEPS_AHEAD)
            bar.update()
    if stop:
        checkpoints.wait()
        raise stop_agreed.stopped(f"step {step} is saved; the same command resumes")
    return state, meta | {"seconds": clock.seconds}


def compile_steps(
    exp: Experiment, state: TrainState
) -> tuple[Callable[[int], jax.stages.Compiled], Any]:
    """The training step's program by number of the step, and that of validation, if there is any.

    What follows small images, or the last layer alone, is compiled in the background meanwhile.
    """
    step = int(state.step)
    phase = exp.phase(step)
    if phase["frozen"]:
        exp.features = interruptibly(partial(kept_features, exp, state))
    shapes = jax.tree.map(  # the arrays themselves are soon donated
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    say("compiling ...")
    started, early = time.perf_counter(), max(exp.small_steps, exp.frozen_steps)
    first = interruptibly(partial(exp.compile_train_step, shapes, **phase))
    validates = "validation" in exp.splits
    eval_step = interruptibly(partial(exp.compile_eval_step, shapes)) if validates else None
    say(f"compiled in {time.perf_counter() - started:.1f} s")
    signals.poll()
    several, full_step = step < early < exp.total_steps, partial(exp.compile_train_step, shapes)
    later: Future | None = in_thread(full_step) if several else None

    def train_step(step: int) -> jax.stages.Compiled:
        if later is not None and (later.done() or step >= early):
            full = later.result()  # or its error, as soon as there is one
            return first if step < early else full
        return first

    return train_step, eval_step


def validate(
    run: Run, eval_step: jax.stages.Compiled, state: TrainState
) -> dict[str, float] | None:
    """Sums over the validation split; None where a stop signal came first."""
    sums: dict[str, float] = {}
    for batch in run.exp.eval_batches("validation"):
        add_sums(sums, jax.device_get(eval_step(state, batch)))
        if run.stop_agreed():
            return None
    return sums


def log_row(
    exp: Experiment, log: Log, step: int, split: str, sums: dict[str, float], rate: float
) -> dict[str, Any]:
    """Writes the means of `sums` to metrics.jsonl and shows them. Returns the row."""
    means, updates = mean_metrics(sums), step - len(log.window.bad_steps)
    row = {
        "step": step,
        "epoch": round(step / exp.steps_per_epoch, 4),
        "split": split,
        **means,
        "learning_rate": float(exp.schedule(max(updates - 1, 0))),
        "images_per_second": round(rate, 1),
        "seconds": round(log.clock.seconds, 3),
    }
    log.writer.write(row)
    figures = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
    epoch, fast = f"epoch {row['epoch']:.2f}/{exp.config.train.epochs}", f"{rate:.0f} images/s"
    if log.bar.disable:
        left = (exp.total_steps - step) * log.clock.train_seconds / step
        fast = f"lr {row['learning_rate']:.3g}  {fast}  {left:.0f} s left"
        say(f"step {step}  {epoch}  {split:10s}  {figures}  {fast}")
    elif split == "train":
        log.bar.set_description_str(f"{figures}  {epoch}  {fast}")
    else:
        say(f"{epoch}  {split}  {figures}  {fast}")
    return row


def write_samples(run: Run, writer: MetricWriter) -> None:
    images = np.asarray(run.exp.augmented_images()[:64])
    images = np.rint(255 * np.clip(images, 0, 1)).astype(np.uint8)
    with files.replacing(run.workdir / SAMPLES) as file:
        np.save(file, images)
    with files.replacing(run.workdir / "first_batch.png") as file:
        Image.fromarray(image_grid(images)).save(file, "PNG")
    writer.image("train/augmented", image_grid(images), 0)


def check_finite(run: Run, window: MetricWindow) -> dict[str, float]:
    """The window's sums; raises DivergedError so that nothing past a bad step is kept."""
    sums, bad = window.fetch(), window.bad_steps
    allowed = run.exp.config.train.max_bad_steps
    if len(bad) <= allowed:
        return sums
    step, path = bad[allowed], run.workdir / "diverged.json"
    ids = [run.exp.splits["train"].ids[i] for i in run.exp.order[step - 1]]
    write_json(path, {"step": step, "bad_steps": bad, "ids": ids})
    raise DivergedError(
        f"loss or gradient is not finite in step {step}, with examples {', '.join(ids[:3])}, "
        f"... (all {len(ids)} in {path}): lower config.optim.learning_rate, set "
        "config.optim.clip_norm, or allow a few with config.train.max_bad_steps"
    )


def open_test(run: Run, state: TrainState, meta: dict[str, Any]) -> None:
    """Evaluates on the test split, once, and writes a report where there is none of the results."""
    workdir, checkpoint = run.workdir, run.exp.config.eval.checkpoint
    run.checkpoints.wait()
    step = run.checkpoints.find(checkpoint)
    if is_evaluated(run.exp.config, workdir, run.exp.splits, step=step):
        say(f"already finished, nothing to do: see {workdir / 'results.json'}")
        return
    if checkpoint == "best":
        state, best = run.checkpoints.restore("best", run.exp.state_target())
        meta = best | {key: meta[key] for key in ("data", "stopped_early") if key in meta}

    def poll() -> None:
        if run.stop_agreed():
            run.checkpoints.wait()
            raise run.stop_agreed.stopped("training is saved; the same command evaluates")

    evaluate(
        Classifier(run.exp, state, meta),
        {name: split for name, split in run.exp.splits.items() if name != "train"},
        workdir,
        split="test",
        checkpoint=checkpoint,
        poll=poll,
    )
