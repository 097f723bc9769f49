"""Trains an image classifier, or resumes it, and says how good it is on the test split.

    python main.py --config=configs/cifar10.py --workdir=runs/cifar10 [--config.key=value ...]

Every key of the config can be set from the command line, such as --config.optim.learning_rate=0.1.
The same command on the same --workdir resumes. Exit codes: 0 done; 2 the command, config or data is
wrong; 3 training diverged; 4 checkpoint trouble; 130 and 143 stopped by Ctrl-C and SIGTERM, saved.
On several machines, or as several processes: see their flags below.
"""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from imgcls import experiment
from imgcls.data.splits import TrainOrder, eval_order
from imgcls.errors import CheckpointError, DivergedError, UserError
from imgcls.evaluation.evaluate import evaluate
from imgcls.evaluation.report import SAMPLES
from imgcls.inference.classifier import Classifier, state_target
from imgcls.losses import cross_entropy
from imgcls.parallel import is_main, make_mesh, put_batch, replicated
from imgcls.run import cli, machine, processes, signals
from imgcls.run.checkpoint import Checkpoints
from imgcls.run.logs import MetricWindow, MetricWriter, image_grid, mean_metrics, progress, say
from imgcls.run.processes import Agreement
from imgcls.run.signals import StopSignal, in_thread, interruptibly
from imgcls.run.workdir import claim, read_json, write_json
from imgcls.state import TrainState, count_parameters, create_state
from imgcls.steps import eval_step, train_step

STEPS_AHEAD = 2  # batches given to the device before the first of them is waited for


def train_and_evaluate(config: ConfigDict, workdir: str | Path) -> TrainState:
    """Trains to the end, from the last checkpoint in `workdir` if any, and evaluates on test.

    Raises:
        UserError, DivergedError, CheckpointError, Stopped: see `imgcls.errors`.
    """
    workdir = Path(workdir)
    machine.start()
    experiment.validate(config)
    with StopSignal() as stop, claim(workdir):
        checkpoints = Checkpoints(workdir / "checkpoints")
        if checkpoints.steps():
            experiment.check_resumable(read_json(workdir / "config.json"), config, workdir)
        run = _Run(config, workdir, checkpoints, stop)
        report = workdir / "report.html"  # written last
        if run.step == run.total_steps and report.exists():
            say(f"already finished, nothing to do: see {workdir / 'results.json'}")
            return run.state
        try:
            report.unlink(missing_ok=True)  # that of fewer epochs
            write_json(workdir / "config.json", experiment.to_json(config))
            run.train()
            run.test()
        except OSError as error:  # a full disk; checkpoints tell of theirs themselves
            raise CheckpointError(
                f"{workdir} cannot be written ({error.strerror}); saved checkpoints are intact: "
                "free some space and run the same command again"
            ) from error
        checkpoints.close()
        return run.state


class _Run:
    """One run: its data, its compiled steps, and where it stands."""

    def __init__(
        self, config: ConfigDict, workdir: Path, checkpoints: Checkpoints, stop: StopSignal
    ):
        self.config, self.workdir, self.checkpoints, self.stop = config, workdir, checkpoints, stop
        self.started = time.perf_counter()
        names = ["train", "test", *(["validation"] if config.data.validation else [])]
        opened = interruptibly(lambda: experiment.open_splits(config, *names))
        self.splits = dict(zip(names, opened))
        self.class_names = self.splits["train"].class_names
        self.order = TrainOrder(
            len(self.splits["train"]), batch_size=config.train.batch_size, seed=config.seed
        )
        self._describe_data()
        self.steps_per_epoch = self.order.steps_per_epoch
        self.total_steps = config.train.epochs * self.steps_per_epoch
        self.early_steps = round(config.train.early_epochs * self.steps_per_epoch)
        self.schedule = experiment.build_schedule(config, steps_per_epoch=self.steps_per_epoch)
        self.mesh = make_mesh()
        self.stop_agreed = Agreement(stop, delay=STEPS_AHEAD)
        self.rng = jax.jit(
            partial(jax.random.key, config.seed), out_shardings=replicated(self.mesh)
        )()
        signals.poll()
        self._restore_or_create()
        signals.poll()

    def _describe_data(self) -> None:
        c = self.config
        for name, split in self.splits.items():
            say(f"{name}: {len(split)} examples, {c.data.name} {split.name}")
        if "validation" not in self.splits:
            say("validation: none, config.data.validation is empty")
        if self.order.steps_per_epoch == 0:
            raise UserError(
                f"config.train.batch_size={c.train.batch_size} is more than the "
                f"{len(self.splits['train'])} examples of {self.splits['train'].name}: lower it"
            )

    def _restore_or_create(self) -> None:
        """The model, the state, and `meta`: what is saved beside it, in JSON types."""
        c, checkpoints = self.config, self.checkpoints
        kernels = machine.choose_cpu_kernels(c)
        self.meta: dict[str, Any] = {
            "class_names": list(self.class_names),
            "train_examples": len(self.splits["train"]),
            "trained_by": machine.describe(),  # where and with what the run was started
            "cpu_kernels": kernels,
            "bits": machine.decides_bits(cpu_kernels=kernels),
            "seconds": 0.0,  # since the first start, all sessions together
            "train_seconds": 0.0,  # of them, in training steps
            "sums": None,  # of the log window that the save interrupted
            "bad_steps": [],
        }
        build = partial(experiment.build_model, c, len(self.class_names))
        self.model = build(cpu_kernels=kernels)
        self.saved_step = -1
        if checkpoints.steps():
            target = state_target(c, self.model)
            self.state, saved = checkpoints.restore_latest(target)
            self._check_same_data(saved)
            kernels = kernels and saved["cpu_kernels"]
            bits = machine.reuse_bits(saved.get("bits", {}), cpu_kernels=kernels)
            self.meta = saved | {"cpu_kernels": kernels, "bits": bits}
            self.model = build(cpu_kernels=kernels)
            self.saved_step = int(self.state.step)
        else:
            create = partial(
                create_state,
                model=self.model,
                tx=experiment.build_optimizer(c, self.schedule),
                ema=c.optim.ema_decay > 0,
            )
            images = self.splits["train"].read(self.order[0])["image"]
            sample = experiment.build_preprocess(c)(images)
            options = {"compiler_options": machine.compiler_options(once=True)}
            create = jax.jit(create, out_shardings=replicated(self.mesh), **options)
            create = create.lower(self.rng, sample)
            create = interruptibly(create.compile)
            machine.check_memory(create)
            self.state = interruptibly(lambda: create(self.rng, sample))
        self.step = int(self.state.step)
        self.window = MetricWindow(self.meta["sums"], self.meta["bad_steps"])
        parameters = count_parameters(self.state.params)
        convolutions = ", convolutions by oneDNN" if self.meta["cpu_kernels"] else ""
        device = machine.describe()["device"]
        dtype = self.model.dtype.name
        if dtype != c.model.dtype:
            dtype += f" (no fast {c.model.dtype} on this CPU)"
        say(f"{c.model.name}: {parameters:,} parameters, {dtype}, {device}{convolutions}")
        if self.saved_step >= 0:
            say(f"resumed at step {self.step} of {self.total_steps}")

    def _check_same_data(self, saved: dict[str, Any]) -> None:
        for key in ("class_names", "train_examples"):
            if saved[key] != self.meta[key]:
                raise UserError(
                    f"the data changed since {self.workdir} was started ({key}: {saved[key]} then, "
                    f"{self.meta[key]} now): restore it, or use another --workdir"
                )

    def _compile(self) -> None:
        """The steps that come next. Images are larger after the early ones: another program."""
        c, options = self.config, {"compiler_options": machine.compiler_options()}
        everywhere = replicated(self.mesh)
        common = {"model": self.model, "preprocess": experiment.build_preprocess(c)}
        train = partial(
            train_step,
            **common,
            tx=experiment.build_optimizer(c, self.schedule),
            loss_fn=partial(cross_entropy, label_smoothing=c.optim.label_smoothing),
            ema_decay=c.optim.ema_decay,
            accumulate_steps=c.train.accumulate_steps,
            unroll=jax.default_backend() == "cpu",
        )
        validate = jax.jit(partial(eval_step, **common), out_shardings=everywhere, **options)

        state = jax.tree.map(  # the arrays themselves are soon donated
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state
        )
        batch = self._train_batch()

        def compile_step(*, early: bool) -> jax.stages.Compiled:
            step = partial(train, augment=experiment.build_augment(c, early=early))
            step = jax.jit(step, donate_argnums=0, out_shardings=everywhere, **options)
            program = step.lower(state, batch, self.rng).compile()
            machine.check_memory(program)
            return program

        def compile_now() -> None:
            early = self.step < self.early_steps
            self.train_steps = {early: compile_step(early=early)}
            if "validation" in self.splits:
                images = next(self._validation_batches())
                self.eval_step = validate.lower(state, images).compile()

        say("compiling ...")
        started = time.perf_counter()
        interruptibly(compile_now)
        self.compile_later = partial(compile_step, early=False)
        say(f"compiled in {time.perf_counter() - started:.1f} s")

    def _train_batch(self) -> dict[str, jax.Array]:
        return put_batch(self._read_train, self.order[self.step], self.mesh)

    def _read_train(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        batch = self.splits["train"].read(indices)
        if self.config.data.alternate_flip:
            batch["mirrored"] = self.order.mirrored(indices, self.step)
        return batch

    def _validation_batches(self) -> Iterator[dict[str, jax.Array]]:
        split = self.splits["validation"]
        for indices in eval_order(len(split), batch_size=self.config.eval.batch_size):
            yield put_batch(split.read, indices, self.mesh)

    def train(self) -> None:
        """To the last step. What is due between two steps is logged, validated and saved there."""
        if self.step < self.total_steps or self._validation_due():
            self._compile()
        self.writer = MetricWriter(
            self.workdir,
            start_step=self.step,
            validated_step=self.checkpoints.validated_step,
        )
        signals.poll()
        several = self.step < self.early_steps < self.total_steps
        self.later = in_thread(self.compile_later) if several else None  # beside the early steps
        self.clock = time.perf_counter()
        self.timed_steps, self.timed_seconds = 0, 0.0  # since the last log line, in this session
        with progress(self.total_steps, "training", "steps", initial=self.step) as self.bar:
            self._between_steps()
            while self.step < self.total_steps:
                self.state, metrics = self._train_step()(self.state, self._train_batch(), self.rng)
                if self.step == 0 and is_main():
                    self._write_samples()  # while the device computes
                self.step += 1
                self.timed_steps += 1
                self.window.add(self.step, metrics)
                self.window.wait(ahead=STEPS_AHEAD)
                self.bar.update()
                self._between_steps()
        self.writer.close()

    def _train_step(self) -> jax.stages.Compiled:
        """The program of this step. The later one's errors are raised as soon as it has ended."""
        early = self.step < self.early_steps
        if self.later is not None and (self.later.done() or not early):
            self.train_steps[False], self.later = self.later.result(), None
        return self.train_steps[early]

    def _write_samples(self) -> None:
        batch = self._read_train(self.order[0])
        images = experiment.augmented_images(self.config, batch, len(self.class_names))
        images = np.rint(255 * np.clip(images[:64], 0, 1)).astype(np.uint8)
        np.save(self.workdir / SAMPLES, images)
        self.writer.image("train/augmented", image_grid(images), 0)

    def _between_steps(self) -> None:
        c, last = self.config.train, self.step == self.total_steps
        if (self.step % c.log_every_steps == 0 or last) and self.timed_steps:
            self._log_training()
        epoch, rest = divmod(self.step, self.steps_per_epoch)
        save = last or (rest == 0 and epoch > 0 and epoch % c.checkpoint_every_epochs == 0)
        means = self._validate() if self._validation_due() else None
        stop = self.stop_agreed()
        if (means or save or stop) and self.step > self.saved_step:
            self._save()
        if means:
            self.checkpoints.record(self.step, means)
        if stop:
            self.checkpoints.wait()
            raise self.stop_agreed.stopped(f"step {self.step} is saved; the same command resumes")

    def _validation_due(self) -> bool:
        epoch, rest = divmod(self.step, self.steps_per_epoch)
        due = rest == 0 and epoch % self.config.train.validate_every_epochs == 0
        due = due or self.step == self.total_steps
        return due and "validation" in self.splits and self.step > self.checkpoints.validated_step

    def _log_training(self) -> None:
        sums = self._checked_window()
        self._lap()
        rate = self.timed_steps * self.config.train.batch_size / self.timed_seconds
        self._log("train", mean_metrics(sums), rate)
        self.window.clear()
        self.timed_steps, self.timed_seconds = 0, 0.0

    def _validate(self) -> dict[str, float] | None:
        """The validation metrics; None where a stop signal came first."""
        self._checked_window()
        self._lap()
        sums = dict.fromkeys(("loss", "correct", "count"), 0.0)
        for batch in self._validation_batches():
            metrics = jax.device_get(self.eval_step(self.state, batch))
            sums = {key: value + float(metrics[key]) for key, value in sums.items()}
            if self.stop_agreed():
                return None
        means = mean_metrics(sums)
        now = time.perf_counter()
        self._log("validation", means, sums["count"] / (now - self.clock))
        self.clock = now  # validation is not training time
        return means

    def _log(self, split: str, means: dict[str, float], rate: float) -> None:
        updates = self.step - len(self.window.bad_steps)
        row = {
            "step": self.step,
            "epoch": round(self.step / self.steps_per_epoch, 4),
            "split": split,
            **means,
            "learning_rate": float(self.schedule(max(updates - 1, 0))),
            "images_per_second": round(rate, 1),
            "seconds": round(self._seconds(), 3),
        }
        self.writer.write(row)
        left = (self.total_steps - self.step) * self.meta["train_seconds"] / self.step
        text = (
            f"epoch {row['epoch']:.2f}/{self.config.train.epochs}  {split:10s}  "
            f"loss {row['loss']:.4f}  top1 {row['top1']:.4f}  lr {row['learning_rate']:.3g}  "
            f"{rate:.0f} images/s"
        )
        if self.bar.disable:
            say(f"step {self.step}  {text}  {left:.0f} s left")
        elif split == "train":
            self.bar.set_description(text)
        else:
            say(text)

    def _save(self) -> None:
        sums = self._checked_window()
        self._lap()
        saved = {"seconds": self._seconds(), "sums": sums, "bad_steps": self.window.bad_steps}
        self.checkpoints.save(self.step, self.state, self.meta | saved)
        self.saved_step = self.step
        self.clock = time.perf_counter()  # saving is not training time

    def _seconds(self) -> float:
        return self.meta["seconds"] + time.perf_counter() - self.started

    def _lap(self) -> None:
        """Counts the time since the last lap or pause as training."""
        now = time.perf_counter()
        lap, self.clock = now - self.clock, now
        self.meta["train_seconds"] += lap
        self.timed_seconds += lap

    def _checked_window(self) -> dict[str, float]:
        """The window's sums; raises DivergedError so that nothing past a bad step is kept."""
        sums = self.window.fetch()
        allowed, bad = self.config.train.max_bad_steps, self.window.bad_steps
        if len(bad) <= allowed:
            return sums
        step = bad[allowed]
        ids = [self.splits["train"].ids[i] for i in self.order[step - 1]]
        path = self.workdir / "diverged.json"
        write_json(path, {"step": step, "bad_steps": bad, "ids": ids})
        raise DivergedError(
            f"loss or gradient is not finite in step {step}, with examples {', '.join(ids[:3])}, "
            f"... (all {len(ids)} in {path}): lower config.optim.learning_rate, set "
            "config.optim.clip_norm, or allow a few with config.train.max_bad_steps"
        )

    def test(self) -> None:
        """Opens the test split, once."""
        state, meta = self.state, self.meta | {"seconds": self._seconds()}
        if self.config.eval.checkpoint == "best":
            self.checkpoints.wait()
            state, meta = self.checkpoints.restore("best", state_target(self.config, self.model))

        def poll() -> None:
            if self.stop_agreed():
                self.checkpoints.wait()
                raise self.stop_agreed.stopped("training is saved; the same command evaluates")

        evaluate(
            Classifier(self.config, self.model, state, meta),
            {name: split for name, split in self.splits.items() if name != "train"},
            self.workdir,
            split="test",
            checkpoint=self.config.eval.checkpoint,
            poll=poll,
        )


def define_flags() -> None:
    config_flags.DEFINE_config_file(
        "config", None, "File with get_config(), such as configs/digits.py.", lock_config=True
    )
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0.")
    flags.DEFINE_integer("num_processes", None, "How many processes train together.")
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
    flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for all.", 1)
    flags.DEFINE_integer("heartbeat_timeout", 30, "Seconds until a silent process is dead.", 1)


def main(_: list[str]) -> None:
    f = flags.FLAGS
    if f.config is None:
        raise UserError("--config is missing: try --config=configs/digits.py")
    workdir = cli.required_workdir()
    try:
        config = f.config.copy_and_resolve_references()  # a file that failed to load fails here
    except OSError as error:
        raise UserError(" ".join(str(error).split())) from None
    with processes.session(
        f.coordinator_address,
        f.num_processes,
        f.process_id,
        start_timeout=f.start_timeout,
        heartbeat_timeout=f.heartbeat_timeout,
    ):
        train_and_evaluate(config, workdir)
