"""Trains an image classifier, or resumes it, and says how good it is on the test split.

    python main.py --config=configs/cifar10.py --workdir=runs/cifar10 [--config.key=value ...]

Every key of the config can be set from the command line, such as --config.optim.learning_rate=0.1.
The same command on the same --workdir resumes. Exit codes: 0 done; 2 the command, config or data is
wrong; 3 training diverged; 4 checkpoint trouble; 130 and 143 stopped by Ctrl-C and SIGTERM, saved.
On several machines, or as several processes: see their flags below.
"""

from absl import flags
from ml_collections import config_flags

from imgcls import cli
from imgcls.errors import UserError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File with get_config(), such as configs/digits.py.", lock_config=True
)
cli.define_workdir()
COORDINATOR_ADDRESS = flags.DEFINE_string("coordinator_address", None, "host:port of process 0.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train together.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
START_TIMEOUT = flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for all.", 1)
HEARTBEAT_TIMEOUT = flags.DEFINE_integer("heartbeat_timeout", 30, "Seconds until dead.", 1)


def main(_: list[str]) -> None:
    if CONFIG.value is None:
        raise UserError("--config is missing: try --config=configs/digits.py")
    workdir = cli.required_workdir()
    from imgcls import distributed  # after the flags: JAX takes a while to import

    try:
        config = CONFIG.value.copy_and_resolve_references()  # a file that failed to load fails here
    except OSError as error:
        raise UserError(" ".join(str(error).split())) from None
    with distributed.session(
        COORDINATOR_ADDRESS.value,
        NUM_PROCESSES.value,
        PROCESS_ID.value,
        start_timeout=START_TIMEOUT.value,
        heartbeat_timeout=HEARTBEAT_TIMEOUT.value,
    ):
        from imgcls.train import train_and_evaluate

        train_and_evaluate(config, workdir)


if __name__ == "__main__":
    cli.run(main, usage=__doc__)
