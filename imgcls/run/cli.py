"""What all commands share: flags that fail in one line, exit codes, and `--debug`.

Exit codes: 0 done; 2 the command, config or data is wrong; 3 training diverged; 4 checkpoint
trouble; stopped by Ctrl-C 130, SIGTERM 143, SIGHUP 129 and SIGUSR1 138, after saving. 1 is a
defect, with its traceback, or another process of the run died.
"""

import inspect
import itertools
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from absl import flags

from imgcls.errors import ImgclsError, UserError, meant, out_of_memory, visible
from imgcls.run import signals
from imgcls.run.logs import complain, drop, say

MISSING = "--config is missing: try --config=configs/digits.py"
HELP = {"--help", "-help", "-h", "-?", "--helpfull", "--helpshort"}

flags.DEFINE_boolean("debug", False, "Show the traceback of errors that have a one-line message.")
flags.DEFINE_string("workdir", None, "Directory of the run: its checkpoints and results.")


def required_workdir() -> Path:
    if not flags.FLAGS.workdir:
        raise UserError("--workdir is missing: try --workdir=runs/digits")
    return Path(flags.FLAGS.workdir)


def run(command: Callable[[], Any], argv: list[str]) -> None:
    """Parses the flags of a command, runs it and exits with its code.

    Args:
        command: imports the command, which has `define_flags()`, its `main(arguments)`, the
            docstring that `--help` prints, `POSITIONAL` where arguments need not be flags, and
            `GROUPS` where a "--" divides them: `main` gets it as "-".
        argv: what was typed, the command's name first.
    """
    if sys.stdout is None:  # closed: writing tells so, as it does of a full disk
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    handler = logging.StreamHandler()
    handler.setFormatter(_Visible("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    for chatty in ("orbax", "jax", "matplotlib", "tensorboardX"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    debug = any(re.fullmatch("--?debug(=(?i:true|t|1))?", word) for word in argv)
    if not debug:
        sys.unraisablehook = _except_tensorstore
    code = 0
    try:
        module = command()
        others = set(flags.FLAGS) - {"debug", "workdir"}  # of the libraries
        typed = re.sub("\0--?config[\0=]", "\0--config=", "\0".join(argv))
        argv = re.sub("\0--?(config\\.[^\0=]+)\0(?!-)", "\0--\\1=", typed).split("\0")
        # A shell leaves the ~ of --name=~/path to the program.
        argv = ["=".join(map(os.path.expanduser, word.split("=", 1))) for word in argv]
        # --config goes before its keys, and of each the last counts. ml_collections, which looks
        # into sys.argv, would join tuples, and define a key again for another --config.
        given = re.compile("--?config[^=]*=").match
        keyed = {word.partition("=")[0]: word for word in filter(given, argv)}
        first = sorted(keyed.values(), key=lambda word: not word.startswith("--config="))
        argv = [*argv[:1], *first, *itertools.filterfalse(given, argv[1:])]
        sys.argv = argv if keyed else sys.argv
        if any(re.match("--?flagfile", word) for word in argv):
            raise UserError("there is no flag --flagfile: write its flags on the command line")
        module.define_flags()
        module.main(_parse(module, argv, set(flags.FLAGS) - others))
    except KeyboardInterrupt:
        code = 130
    except SystemExit as error:
        code = error.code or 0
    except BaseException as error:
        known = error if isinstance(error, ImgclsError) else out_of_memory(error)
        if known is None or debug:
            complain(traceback.format_exc())
        if known is not None:
            line = " ".join(str(known).splitlines())
            complain(f"error: {line}" if known.exit_code < 128 else line)
        code = 1 if known is None else known.exit_code
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a closed pipe or terminal, a full disk
            drop(stream)
    if signals.left_behind() or jax.distributed.is_initialized():
        # A compilation or a save that hangs, or a peer that is gone, must not hold the process.
        os._exit(code if isinstance(code, int) else 1)
    sys.exit(code)


class _Visible(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def _except_tensorstore(unraisable: Any) -> None:
    """In place of sys.unraisablehook: silent where orbax reports what failed of each array.

    Of a save its C++ threads do so to an event loop that is closed by then. The first failure
    is raised in the main thread.
    """
    if not re.search("^Event loop is closed$|full TensorStore details", str(unraisable.exc_value)):
        sys.__unraisablehook__(unraisable)


def _parse(module: Any, argv: list[str], own: set[str]) -> list[str]:
    if HELP & set(argv):
        more = module.more_help(argv) if hasattr(module, "more_help") else ""
        ours = [flags.FLAGS[name] for name in sorted(own)]
        lines = [f"  --{flag.name}={flag.default}  {flag.help}" for flag in ours]
        say("\n".join([inspect.cleandoc(module.__doc__ or ""), "", *lines, more]))
        raise SystemExit(0)
    if hasattr(module, "GROUPS"):  # absl would drop a "--", and read no flag after it
        argv = ["-" if word == "--" else word for word in argv]
    keys = module.check_flags(argv) if hasattr(module, "check_flags") else []
    _refuse_unknown(itertools.takewhile("--".__ne__, argv[1:]), own, keys)
    try:
        arguments = flags.FLAGS(argv)[1:]
    except flags.IllegalFlagValueError as error:
        name, value = re.findall("flag --(.+?)=(.*?): ", str(error), re.DOTALL)[0]
        parser: Any = flags.FLAGS[name].parser
        kinds = {"bool": "true or false", "tuple": "a tuple such as (32,32)"}
        wanted = parser.syntactic_help or kinds.get(parser.flag_type())
        wanted = wanted or f"one of {', '.join(parser.enum_values)}"
        raise UserError(f"--{name}={value} must be {wanted}") from error
    except Exception as error:  # of a flag or a key
        text = re.sub(r"[\\'\"\s]+", " ", str(error)).strip()
        raise UserError(f"{text} (see --help)") from error
    for name in own:
        if (value := flags.FLAGS[name].value) != value:
            raise UserError(f"--{name}={value} must be a number")
        if name in ("workdir", "output", "data_dir") and "://" in (value or ""):
            raise UserError(f"--{name}={value} is remote: name a path of this machine")
    for word in arguments if not hasattr(module, "POSITIONAL") else ():
        run, plain = os.path.exists(f"{word}/config.json"), word.lstrip("-–— ")
        fits = {"config": word.endswith(".py"), "workdir": run, "data_dir": os.path.isdir(word)}
        near = [plain] if "=" in plain else [f"{k}={word}" for k in fits if fits[k] and k in own]
        _refuse_unknown([f"--{plain}"] if "=" in plain else [], own, keys)
        hint = f"did you mean --{near[0]}?" if near else "flags are --name=value"
        raise UserError(f"unexpected argument {word!r}: {hint}")
    return arguments


def _refuse_unknown(words: Iterable[str], own: set[str], keys: list[str]) -> None:
    """Raises UserError for a flag that is neither one of `own` nor of the `keys` of a config."""
    for name in (w.lstrip("-").partition("=")[0] for w in words if re.match("--?[a-zA-Z]", w)):
        if {name, name.removeprefix("no")} & {*own, *keys}:
            continue
        known, told = [f"--{k}" for k in (*sorted(own), *keys)], f"there is no flag --{name}"
        if name.partition(".")[0] == "config" and not keys:
            if "config" in own:
                raise UserError(MISSING)
            if settable := [flag for flag in known if flag.startswith("--config.")]:
                known, told = settable, f"--{name} cannot be set after training"
        raise UserError(f"{told}: {meant(name, known)}")
