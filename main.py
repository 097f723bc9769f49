"""Trains an image classifier, or resumes it, and says how good it is on the test split.

    python main.py --config=configs/cifar10.py --workdir=runs/cifar10 [--config.key=value ...]

Every key of the config can be set from the command line, such as --config.optim.learning_rate=0.1.
The same command on the same --workdir resumes. Exit codes: 0 done; 2 the command, config or data is
wrong; 3 training diverged; 4 checkpoint trouble; 130 and 143 stopped by Ctrl-C and SIGTERM, saved.
"""

from ml_collections import config_flags

from imgcls import cli
from imgcls.errors import UserError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File with get_config(), such as configs/digits.py.", lock_config=True
)
cli.define_workdir()


def main(_: list[str]) -> None:
    if CONFIG.value is None:
        raise UserError("--config is missing: try --config=configs/digits.py")
    workdir = cli.required_workdir()
    from imgcls.train import train_and_evaluate  # after the flags: JAX takes a while to import

    try:
        config = CONFIG.value.copy_and_resolve_references()  # a file that failed to load fails here
    except OSError as error:
        raise UserError(" ".join(str(error).split())) from None
    train_and_evaluate(config, workdir)


if __name__ == "__main__":
    cli.run(main, usage=__doc__)
