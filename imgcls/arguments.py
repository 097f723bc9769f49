"""The config on a command line: --config=FILE, and --config.KEY=VALUE."""

import re
import runpy
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from imgcls.config import flatten, keys_of, nearest
from imgcls.errors import UserError, did_you_mean
from imgcls.keys import HARMLESS, KEYS


def from_arguments(argv: list[str]) -> ConfigDict | None:
    """The config that --config=FILE or --config=FILE:MODEL names, before flags set its keys.

    Raises UserError where there is no such file, or where it offers no choice of a model.
    """
    given = [argument for argument in argv if re.match("--?config=", argument)]
    if not given:
        return None
    path, _, model = given[-1].partition("=")[2].partition(":")
    if not Path(path).is_file():
        there = [*Path(path).parent.glob("*.py"), *Path("configs").glob("*.py")]
        same = [file for file in there if file.stem == Path(path).stem]
        near = (
            did_you_mean(path, map(str, same[:1] or there), "--config=")
            or "name a file with get_config()"
        )
        raise UserError(f"--config={path} does not exist: {near}")
    try:
        return runpy.run_path(path)["get_config"](*([model] if model else []))
    except TypeError as error:
        if model and "positional argument" in str(error):
            raise UserError(f"{path} offers no choice of a model: leave :{model} away") from None
        raise


def check_flags(argv: list[str]) -> None:
    """Raises UserError for a flag that does not exist, where a key of the config is near."""
    config = from_arguments(argv)
    keys = {} if config is None else flatten(config)
    for argument in argv if keys else []:
        name = argument.lstrip("-").partition("=")[0]
        if not argument.startswith("--") or name in flags.FLAGS:
            continue
        if name.startswith("config."):
            key = name.removeprefix("config.")
            if key not in keys:
                raise UserError(f"{name} is not a key of this config: {nearest(key, keys)}")
        elif found := [key for key in keys if key.rpartition(".")[2] == name.rpartition(".")[2]]:
            near = did_you_mean(name, found, prefix="--config.")
            raise UserError(f"there is no flag --{name}: {near}")


def describe(argv: list[str]) -> str:
    """For --help: a line per key of the config that is named, with its value and its meaning."""
    config = from_arguments(argv)
    if config is None:
        return "With --config=FILE, --help lists every key of that config."
    flat = flatten(config)
    lines = [(f"  --config.{k}={flat[k]}", key.meaning) for k, key in keys_of(flat).items()]
    width = min(48, max(len(flag) for flag, _ in lines))
    return "\n".join(f"{flag:{width}}  {meaning}".rstrip() for flag, meaning in lines)


def define_harmless() -> None:
    """Flags --config.KEY of what changes no result, for commands that use a trained run."""
    for key in HARMLESS:
        define = flags.DEFINE_integer if KEYS[key].rule.kind is int else flags.DEFINE_string
        define(f"config.{key}", None, KEYS[key].meaning)


def harmless() -> dict[str, Any]:
    """What was given of these flags, by key."""
    names = {f"config.{key}": key for key in HARMLESS}
    given = {names[name]: flags.FLAGS[name].value for name in names if name in flags.FLAGS}
    return {key: value for key, value in given.items() if value is not None}
