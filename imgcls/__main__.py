"""The commands of imgcls.

    python -m imgcls COMMAND [--flag=value ...]     or, once installed, imgcls COMMAND ...

    train      train, or resume, and evaluate on the test split (also: python main.py)
    evaluate   how good a trained model is on a split of its data
    predict    what a trained model says about pictures
    report     report.html, written again from the files of a finished run
    compare    whether one run is better than another
    export     a trained model as one file for other programs
    profile    where a training step's time goes

python -m imgcls COMMAND --help tells the flags of one.
"""

import sys
from types import ModuleType

from imgcls.errors import UserError, did_you_mean
from imgcls.run import cli

COMMANDS = ("train", "evaluate", "predict", "report", "compare", "export", "profile")


def command(name: str) -> ModuleType:
    """The module of a command: `define_flags`, `main(arguments)` and a docstring for `--help`."""
    match name:  # only what is asked for is imported
        case "train":
            from imgcls import train as module
        case "evaluate":
            from imgcls.evaluation import evaluate as module
        case "predict":
            from imgcls.inference import predict as module
        case "report":
            from imgcls.evaluation import report as module
        case "compare":
            from imgcls.evaluation import compare as module
        case "export":
            from imgcls.inference import export as module
        case "profile":
            from imgcls import profile as module
        case _:
            near = did_you_mean(name, COMMANDS) or f"it is one of {', '.join(COMMANDS)}"
            raise UserError(f"there is no command {name!r}: {near}")
    return module


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in cli.HELP:
        print(__doc__)
    else:
        cli.run(lambda: command(name), sys.argv[1:])


if __name__ == "__main__":
    main()
