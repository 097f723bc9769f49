"""The config on a command line: --config=FILE, and --config.KEY=VALUE."""

import runpy
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from imgcls.config import flatten, keys_of, validate
from imgcls.errors import ImgclsError, UserError, did_you_mean, first_line
from imgcls.keys import HARMLESS, KEYS


def from_arguments(argv: list[str]) -> ConfigDict | None:
    """The config that --config=FILE or --config=FILE:MODEL names, before flags set its keys.

    Raises UserError where there is no such file, or its get_config() fails or offers no models.
    """
    if not (given := [word for word in argv if word.startswith("--config=")]):
        return None
    path, _, model = given[-1].partition("=")[2].partition(":")
    if not Path(path).is_file():
        there = sorted({*Path(path).parent.glob("*.py"), *Path("configs").glob("*.py")})
        names = [f"--config={file}" for file in there]
        near = did_you_mean(Path(path).stem, [file.stem for file in there], names)
        near = near or f"there are {', '.join(names) or 'none in configs'}"
        raise UserError(f"--config={path} is no file: {near}")
    try:
        config = runpy.run_path(path)["get_config"](*([model] if model else []))
        if not isinstance(config, ConfigDict):
            raise TypeError(f"get_config() must return a config, not {config!r:.20}")
        return config
    except Exception as error:
        if isinstance(error, ImgclsError):
            raise
        if model and "positional argument" in str(error):
            raise UserError(f"{path} offers no choice of a model: leave :{model} away") from None
        why = f"fails ({type(error).__name__}: {first_line(error)})"
        raise UserError(f"--config={path} {why}: name a file with get_config()") from error


def check_flags(argv: list[str]) -> list[str]:
    """The flags config.KEY of the config that is named, if any.

    Raises UserError where a flag names another model, optimiser or task.
    """
    if (config := from_arguments(argv)) is None:
        return []
    flat, given = flatten(config), dict(word.lstrip("-").partition("=")[::2] for word in argv)
    named = ("model.name", "optim.name", "task.name")
    names = {k: given[f"config.{k}"] for k in named if f"config.{k}" in given}
    if names != {k: flat.get(k) for k in names}:
        validate(flat | names)
    return [f"config.{key}" for key in keys_of(flat)]


def describe(argv: list[str]) -> str:
    """For --help: a line per key of the config that is named, with its value and its meaning."""
    if (config := from_arguments(argv)) is None:
        return "With --config=FILE, --help lists every key of that config."
    flat = flatten(config)
    lines = [(f"  --config.{k}={flat[k]}", key.meaning) for k, key in keys_of(flat).items()]
    width = min(48, max(len(flag) for flag, _ in lines))
    return "\n".join(f"{flag:{width}}  {meaning}".rstrip() for flag, meaning in lines)


def define_harmless(*, checkpoint: bool = False, raw: bool = False) -> None:
    """Flags --config.KEY of what changes no result, for commands that use a trained run."""
    if checkpoint:
        flags.DEFINE_string("checkpoint", "", "latest, best or a step; else the config's choice.")
    if raw:
        flags.DEFINE_boolean("raw", False, "Probabilities as trained, not calibrated.")
    for key in HARMLESS:
        define = flags.DEFINE_integer if KEYS[key].rule.kind is int else flags.DEFINE_string
        define(f"config.{key}", None, KEYS[key].meaning)


def harmless() -> dict[str, Any]:
    """What was given of these flags, by key."""
    known = [key for key in HARMLESS if f"config.{key}" in flags.FLAGS]
    return {k: v for k in known if (v := flags.FLAGS[f"config.{k}"].value) is not None}
