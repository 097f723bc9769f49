"""What all commands share: flags that fail in one line, exit codes, and `--debug`.

Exit codes: 0 done; 2 the command, config or data is wrong; 3 training diverged; 4 checkpoint
trouble; 130 stopped by Ctrl-C and 143 by SIGTERM, after saving. 1 is a defect, with its traceback,
or another process of the run died.
"""

import contextlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from imgcls.errors import ImgclsError, UserError, out_of_memory
from imgcls.logs import say

flags.DEFINE_boolean("debug", False, "Show the traceback of errors that have a one-line message.")


def define_workdir() -> None:
    flags.DEFINE_string("workdir", None, "Directory of the run: its checkpoints and results.")


def required_workdir() -> Path:
    if not flags.FLAGS.workdir:
        raise UserError("--workdir is missing: try --workdir=runs/digits")
    return Path(flags.FLAGS.workdir)


def run(main: Callable[[list[str]], None], *, usage: str, positional: bool = False) -> None:
    """Parses sys.argv, calls main(positional arguments) and exits with its code.

    Args:
        main: the command.
        usage: what `--help` prints above the flags.
        positional: whether the command takes arguments that are not flags.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    for chatty in ("orbax", "jax", "matplotlib", "tensorboardX"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Orbax warns of what is meant here, and prints the traceback of errors that become ours.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if "--debug" not in sys.argv:
        sys.unraisablehook = _except_tensorstore
    code = 0
    try:
        arguments = _parse(usage)
        if arguments and not positional:
            raise UserError(f"unexpected argument {arguments[0]!r}: flags are --name=value")
        main(arguments)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        known = error if isinstance(error, ImgclsError) else out_of_memory(error)
        if known is None or "--debug" in sys.argv:
            traceback.print_exc()
        if known is not None:
            print(f"error: {known}" if known.exit_code < 128 else known, file=sys.stderr)
        code = 1 if known is None else known.exit_code
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a closed pipe
            stream.flush()
    # Not sys.exit: a compilation or a save left behind in a thread must not hold the process.
    os._exit(code)


def _except_tensorstore(unraisable: Any) -> None:
    """In place of sys.unraisablehook: silent where orbax's C++ threads report a failed save.

    They do so for each array, to an event loop that is closed by then. The failure itself is
    raised in the main thread.
    """
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)


def _parse(usage: str) -> list[str]:
    if {"--help", "-help", "-h", "-?"} & set(sys.argv):
        own = (flags.FLAGS.main_module_help(), flags.FLAGS.module_help(__name__))
        say("\n".join([usage, *own]))
        raise SystemExit(0)
    try:
        return flags.FLAGS(sys.argv)[1:]
    except Exception as error:  # a flag, or anything that the user's config file raises
        text = re.sub(r"[\\'\"\s]+", " ", str(error)).strip()
        kind = "" if isinstance(error, flags.Error | KeyError | AttributeError) else "config: "
        raise UserError(f"{kind}{text} (see --help)") from error
