"""What a sweep tries: a space of config keys, and points of it in a fixed order.

    {"optim.learning_rate": ("log", 0.001, 0.1), "train.batch_size": [64, 128]}

A range is (scale, low, high), with a scale of `SCALES`. Two whole numbers give whole numbers. A
list holds choices. A choice that is itself a space sets the keys in it, such as
`"model": [{"model.name": "mlp"}, {"model.name": "cnn", "model.widths": [(16,), (32,)]}]`.
"""

import ast
import json
import math
import runpy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ml_collections import ConfigDict

from imgcls.config import default_config, flatten, from_json, to_json
from imgcls.errors import UserError, first_line, meant
from imgcls.keys import KEYS

Space = dict[str, Any]
Function = Callable[[float], float]
SCALES: dict[str, tuple[Function, Function]] = {
    "linear": (float, float),
    "log": (math.log, math.exp),
    "reverse_log": (lambda x: -math.log1p(-x), lambda u: -math.expm1(-u)),  # such as 0.9 to 0.999
}
# Runs that differ in these cannot be ranked by the same validation, or not after the same epoch.
NOT_TUNED = ("seed", "train.epochs", "train.validate_every_epochs", "data.name", "data.dir")
NOT_TUNED += ("data.validation", "data.test", "train.steps", "train.patience")
DRAWS = 1000  # without a new point, after which a space of choices counts as exhausted
STARTUP, GENERATION = 10, 5  # points of TPE that do not depend on results, then that come together


def read_space(specs: Sequence[str]) -> Space:
    """From files with get_space(), and KEY=VALUES such as "optim.learning_rate=log(0.01, 1)"."""
    space: Space = {}
    for spec in specs:
        key, _, values = spec.partition("=")
        try:
            if spec.endswith(".py") and not values:
                space |= runpy.run_path(spec)["get_space"]()
                continue
            node = ast.parse(values.strip(), mode="eval").body
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                space[key.strip()] = (node.func.id, *map(ast.literal_eval, node.args))
            else:
                space[key.strip()] = ast.literal_eval(node)
        except Exception as error:  # whatever the file raises
            raise UserError(
                f"--space={spec} cannot be read ({first_line(error)}): name a file with "
                'get_space(), or KEY=VALUES such as "optim.learning_rate=log(0.01, 1)", '
                '"train.batch_size=[8, 16]"'
            ) from error
    return canonical(space)


def canonical(space: Space) -> Space:
    """The space in JSON types: a range is {scale: [low, high]}, and all else a list of choices.

    Raises:
        UserError: a range or a list without sense, or a key that is not tuned.
    """
    found: Space = {}
    for key, spec in space.items():
        if key in NOT_TUNED:
            raise UserError(f"--space: {key} must be the same in all trials; leave it out")
        if isinstance(spec, tuple) and spec and isinstance(spec[0], str):
            scale, *bounds = spec
            _check_range(key, scale, bounds)
            found[key] = {scale: bounds}
        else:
            choices = spec if isinstance(spec, list) else [spec]
            kinds = str | int | float | tuple | list | dict
            if not choices or not all(isinstance(choice, kinds) for choice in choices):
                raise UserError(f"--space: {key}={spec} must be a list of values, such as [8, 16]")
            found[key] = [canonical(c) if isinstance(c, dict) else c for c in choices]
    return json.loads(json.dumps(found))


def _check_range(key: str, scale: str, bounds: Sequence[Any]) -> None:
    within = {"log": (0, math.inf), "reverse_log": (-math.inf, 1)}.get(scale, (-math.inf, math.inf))
    right = scale in SCALES and len(bounds) == 2 and all(isinstance(b, int | float) for b in bounds)
    if not right or not within[0] < bounds[0] < bounds[1] < within[1]:
        given = ", ".join(map(str, bounds))
        raise UserError(
            f"--space: {key}={scale}({given}) must be log(low, high) over 0, linear(low, high), or "
            "reverse_log(low, high) under 1"
        )


def coordinates(space: Space, prefix: str = "") -> dict[str, Any]:
    """The coordinates of the unit cube, in order: a choice's own, then those of its options."""
    found = {}
    for key, spec in space.items():
        if not isinstance(spec, list) or len(spec) > 1:
            found[prefix + key] = spec
        for i, option in enumerate(spec if isinstance(spec, list) else []):
            if isinstance(option, dict):
                found |= coordinates(option, f"{prefix}{key}[{i}].")
    return found


def point(space: Space, cube: dict[str, float], prefix: str = "") -> dict[str, Any]:
    """The config keys at a point of the unit cube, given as {coordinate: [0, 1)}."""
    values: dict[str, Any] = {}
    for key, spec in space.items():
        x = cube.get(prefix + key, 0.0)
        if isinstance(spec, list):
            i = min(int(x * len(spec)), len(spec) - 1)
            nested = isinstance(spec[i], dict)
            values |= point(spec[i], cube, f"{prefix}{key}[{i}].") if nested else {key: spec[i]}
        else:
            ((scale, (low, high)),) = spec.items()
            there, back = SCALES[scale]
            whole = type(low) is type(high) is int and scale != "reverse_log"
            a, b = there(low), there(high + whole)
            value = back(a + x * (b - a))
            # Four digits, so that what a table shows is what was trained.
            rounded = int(value) if whole else float(f"{value:.4g}")
            values[key] = min(max(rounded, low), high)
    return values


def halton_points(
    space: Space, config: ConfigDict, trials: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """Up to `trials` distinct points and where they are in the cube; more begin with the same.

    The first is {}, the config as it is. The others follow the scrambled Halton sequence (arXiv
    1706.03200). There are fewer where a space of choices has no more.
    """
    from scipy.stats import qmc

    names, flat = list(coordinates(space)), flatten(to_json(config))
    points: list[dict[str, Any]] = [{}]
    cubes: list[dict[str, float]] = [{}]
    sequence, repeats = qmc.Halton(max(len(names), 1), scramble=True, rng=seed), 0
    while space and len(points) < trials and repeats < (DRAWS if names else 1):
        cube = dict(zip(names, map(float, sequence.random(1)[0])))
        new, repeats = point(space, cube), repeats + 1
        if new not in points and any(flat.get(key) != value for key, value in new.items()):
            points, cubes, repeats = [*points, new], [*cubes, cube], 0
    return points, cubes


def tpe_cube(
    space: Space, earlier: Iterable[tuple[dict[str, float], float]], seed: int
) -> dict[str, float]:
    """Where the tree-structured Parzen estimator (Bergstra et al. 2011) would look next.

    A pure function of the places in the cube that were tried, with their results (more is better).
    """
    import optuna  # which `sweep.start` has asked for

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds: dict[str, Any] = {
        name: optuna.distributions.CategoricalDistribution(range(len(spec)))
        if isinstance(spec, list)
        else optuna.distributions.FloatDistribution(0, 1)
        for name, spec in coordinates(space).items()
    }
    index = lambda name, x: min(int(x * len(kinds[name].choices)), len(kinds[name].choices) - 1)
    is_choice = lambda name: isinstance(kinds[name], optuna.distributions.CategoricalDistribution)
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed % 2**32, n_startup_trials=0),
    )
    for cube, value in earlier:
        params = {n: index(n, x) if is_choice(n) else x for n, x in cube.items()}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=kinds, value=value))
    drawn = study.ask(kinds).params
    return {n: (x + 0.5) / len(kinds[n].choices) if is_choice(n) else x for n, x in drawn.items()}


def config_at(config: ConfigDict, point: dict[str, Any]) -> ConfigDict:
    """The config with the values of a point; another model or optimiser brings its own keys.

    Raises:
        UserError: a key that the config does not have then, or a value that is refused.
    """
    flat = flatten(to_json(config))
    names = {part: point.get(f"{part}.name", flat[f"{part}.name"]) for part in ("model", "optim")}
    changed = [part for part, name in names.items() if name != flat[f"{part}.name"]]
    base = default_config(names["model"], names["optim"], flat["task.name"])
    kept = {k: v for k, v in flat.items() if k in KEYS or k.partition(".")[0] not in changed}
    point = point | {f"{part}.name": base[part].name for part in names}  # "resnet18" is a resnet
    for key in point.keys() - (known := flatten(base)).keys():
        shown = " and ".join(f"config.{part}.name={base[part].name}" for part in names)
        near = meant(key, [f"config.{k}" for k in known])
        raise UserError(f"--space: config.{key} is not a key of a config with {shown}: {near}")
    return from_json(flatten(to_json(base)) | kept | point)
