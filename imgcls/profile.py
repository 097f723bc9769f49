"""Where a training step's time goes: a trace of a few steps, and the dearest operations.

    python -m imgcls profile --workdir=runs/cifar10 [--steps=5]

Reads the run's own config and continues in memory from its latest checkpoint, or from the start.
Writes the trace to WORKDIR/profile, and opens the checkpoints as a resume does: a damaged one is
set aside. The run must not be under way.
"""

import re
import time
from collections import Counter
from pathlib import Path

import jax
from absl import flags

from imgcls.arguments import define_harmless
from imgcls.experiment import Experiment, load_config
from imgcls.features import kept_features
from imgcls.run import cli, machine
from imgcls.run.checkpoint import Checkpoints
from imgcls.run.logs import say
from imgcls.run.processes import Agreement
from imgcls.run.signals import StopSignal, poll
from imgcls.run.workdir import claim
from imgcls.train import Run, start_or_resume

SHOWN = 15


def profile(workdir: Path, *, steps: int) -> list[tuple[str, str, float]]:
    """Traces compiled training steps into WORKDIR/profile, and says what they spend time on.

    Returns:
        Per operation of the compiled step its name in the trace, where in the model or step it
        comes from, and its milliseconds a step; the dearest first. An operation that contains
        others includes their time.

    Raises:
        UserError, CheckpointError: the workdir holds no run, a damaged one, or one under way.
    """
    machine.start()
    config = load_config(workdir)
    with StopSignal() as stop, claim(workdir):
        exp = Experiment(config, test=False)
        run = Run(exp, workdir, Checkpoints(workdir / "checkpoints"), Agreement(stop, delay=0))
        state, _ = start_or_resume(run)
        step = min(int(state.step), exp.total_steps - 1)  # of a finished run, the last
        phase = exp.phase(step)
        exp.features = kept_features(exp, state) if phase["frozen"] else None
        train_step = exp.compile_train_step(state, **phase)
        batch = exp.train_batch(step)
        state, metrics = train_step(state, batch, exp.rng)  # the first is not like the rest
        jax.block_until_ready(metrics)
        with jax.profiler.trace(workdir / "profile", create_perfetto_trace=True):
            started = time.perf_counter()
            for _ in range(steps):
                poll()
                state, metrics = train_step(state, batch, exp.rng)
            jax.block_until_ready(metrics)
            milliseconds = 1000 * (time.perf_counter() - started) / steps
    folder = max((workdir / "profile" / "plugins" / "profile").iterdir())
    operations = _operations(folder, train_step.as_text() or "", steps)
    say(f"a step takes {milliseconds:.1f} ms while it is traced; of that, in operations:")
    for name, source, spent in operations[:SHOWN]:
        say(f"{spent:10.2f} ms {spent / milliseconds:6.1%}  {name:32s} {source[-80:]}")
    say(f"look at it with tensorboard --logdir={workdir}/profile (pip install tensorboard xprof)")
    say(f"or open {folder}/perfetto_trace.json.gz in https://ui.perfetto.dev")
    return operations


def _operations(folder: Path, program: str, steps: int) -> list[tuple[str, str, float]]:
    """The operations of the compiled `program`, an HLO text, found in the trace in `folder`."""
    sources = dict(re.findall(r'%([\w.-]+) = .* metadata=\{.*?op_name="([^"]*)"', program))
    module, spent = re.findall(r"HloModule (\w+)", program)[0], Counter[str]()
    (path,) = folder.glob("*.xplane.pb")
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for event in (event for line in plane.lines for event in line.events):
            stats = dict(event.stats)
            if "hlo_op" in stats and stats.get("hlo_module") == module:
                spent[stats["hlo_op"]] += event.duration_ns / 1e6 / steps
    # Every path begins with the step's own jit.
    return [(name, sources.get(name, "").partition("/")[2], t) for name, t in spent.most_common()]


def define_flags() -> None:
    flags.DEFINE_integer("steps", 5, "How many training steps to trace.", 1)
    define_harmless()


def main(_: list[str]) -> None:
    profile(cli.required_workdir(), steps=flags.FLAGS.steps)
