"""The commands of imgcls.

    python -m imgcls COMMAND [--flag=value ...]     or, once installed, imgcls COMMAND ...

    train      train, or resume, and evaluate on the test split (also: python main.py)
    evaluate   how good a trained model is on a split of its data
    predict    what a trained model says about pictures
    embed      features of pictures, for search and clustering
    report     report.html, written again from the files of a finished run
    compare    whether one run is better than another
    export     a trained model as one file for other programs
    profile    where a training step's time goes
    sweep      many runs: which values of the config's keys are best on validation

python -m imgcls COMMAND --help tells the flags of one.
"""

import importlib
import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from imgcls.arguments import check_flags, describe
from imgcls.errors import UserError, did_you_mean
from imgcls.run import cli, processes


class Train:
    """Trains an image classifier, or resumes it, and says how good it is on the test split.

        python main.py --config=configs/cifar10.py --workdir=runs/cifar10 [--config.key=value ...]

    Every key of the config can be set from the command line. The same command on the same --workdir
    resumes. Exit codes: 0 done; 2 the command, config or data is wrong; 3 training diverged; 4
    checkpoint trouble; 130, 143, 129 and 138 stopped by Ctrl-C, SIGTERM, SIGHUP and SIGUSR1, saved.
    On several machines, or as several processes: see their flags below.
    """

    @staticmethod
    def define_flags() -> None:
        config_flags.DEFINE_config_file(
            "config", None, "File with get_config(), such as configs/digits.py.", lock_config=True
        )
        flags.DEFINE_string("coordinator_address", None, "host:port of process 0.")
        flags.DEFINE_integer("num_processes", None, "How many processes train together.")
        flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
        flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for all.", 1)
        flags.DEFINE_integer("heartbeat_timeout", 30, "Seconds until a silent one is dead.", 1)

    check_flags = staticmethod(check_flags)
    more_help = staticmethod(describe)

    @staticmethod
    def main(_: list[str]) -> None:
        from imgcls.train import train_and_evaluate

        f = flags.FLAGS
        if f.config is None:
            raise UserError(cli.MISSING)
        workdir = cli.required_workdir()
        with processes.session(
            f.coordinator_address,
            f.num_processes,
            f.process_id,
            start_timeout=f.start_timeout,
            heartbeat_timeout=f.heartbeat_timeout,
        ):
            train_and_evaluate(f.config.copy_and_resolve_references(), workdir)


MODULES = {"evaluate": "evaluation.evaluate", "predict": "inference.predict"}
MODULES |= {"embed": "inference.embed", "report": "evaluation.report", "profile": "profile"}
MODULES |= {"compare": "evaluation.compare", "export": "inference.export", "sweep": "tuning.sweep"}


def command(name: str) -> Any:
    """What `cli.run` needs of a command: `define_flags`, `main(arguments)` and a docstring."""
    if name in MODULES:  # only what is asked for is imported
        return importlib.import_module(f"imgcls.{MODULES[name]}")
    if name != "train":
        known = ("train", *MODULES)
        near = did_you_mean(name, known) or f"it is one of {', '.join(known)}"
        raise UserError(f"there is no command {name!r}: {near}")
    return Train


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in cli.HELP:
        print(__doc__)
    else:
        cli.run(lambda: command(name), sys.argv[1:])


if __name__ == "__main__":
    main()
