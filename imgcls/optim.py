"""Learning-rate schedules and optimisers, from explicit arguments. Steps are parameter updates.

An optimiser is a function of a schedule. Its keyword arguments are config keys, and their meanings
are read from its docstring.
"""

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from imgcls.models import head_of

# a, b and c of Muon's iteration x <- x (a + b x'x + c (x'x)^2), and how many of them are enough
# here (airbench94_muon has 3).
NEWTON_SCHULZ, ITERATIONS = (3.4445, -4.7750, 2.0315), 3

# Each takes (peak, steps) and covers what follows the warmup.
SCHEDULES = {
    "constant": lambda peak, steps: optax.constant_schedule(peak),
    "cosine": lambda peak, steps: optax.cosine_decay_schedule(peak, steps),
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
    # Divided by ten after half and after three quarters, as in arXiv 1512.03385.
    "step": lambda peak, steps: optax.piecewise_constant_schedule(
        peak, {steps // 2: 0.1, steps * 3 // 4: 0.1}
    ),
}


def create_schedule(
    name: str, *, learning_rate: float, warmup_steps: int, total_steps: int, probe: Any = (0.0, 0)
) -> optax.Schedule:
    """Rises linearly from zero to `learning_rate` in `warmup_steps`, then follows `name`.

    Before that it follows `name` for a `probe`: from a learning rate, of a number of steps.
    """
    after = SCHEDULES[name](learning_rate, max(total_steps - probe[1] - warmup_steps, 1))
    if warmup_steps:
        warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
        after = optax.join_schedules([warmup, after], [warmup_steps])
    if not probe[1]:
        return after
    return optax.join_schedules([SCHEDULES[name](*probe), after], [probe[1]])


def matrices_and_kernels(params: optax.Params) -> optax.Params:
    """True for what weight decay applies to: not biases, and not the norms' scales."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def _sgd(schedule, *, momentum=0.9, weight_decay=0.0):
    """SGD with Nesterov momentum.

    Args:
        momentum: of Nesterov; 0: none
        weight_decay: added to the gradient before the momentum: the L2 penalty of classic recipes
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, matrices_and_kernels),
        optax.sgd(schedule, momentum=momentum or None, nesterov=momentum > 0),
    )


def _adamw(schedule, *, momentum=0.9, weight_decay=0.0):
    """AdamW (arXiv 1711.05101).

    Args:
        momentum: decay of the average of gradients, b1
        weight_decay: times the learning rate, of kernels and matrices
    """
    return optax.adamw(schedule, b1=momentum, weight_decay=weight_decay, mask=matrices_and_kernels)


def _lion(schedule, *, momentum=0.9, weight_decay=0.0):
    """Lion (arXiv 2302.06675).

    Args:
        momentum: b1
        weight_decay: times the learning rate, of kernels and matrices
    """
    return optax.lion(schedule, b1=momentum, weight_decay=weight_decay, mask=matrices_and_kernels)


def orthogonalize(kernel: jax.Array) -> jax.Array:
    """Muon's update (Jordan et al., 2024) of a kernel [H, W, I, O], by Newton-Schulz iterations.

    Seen as a matrix x of shape [H * W * I, O], the kernel's singular values move towards 1, except
    tiny ones. An iteration x <- x q(x'x) would take two products with x, the largest matrix. Here
    the iterations go over the small square x'x (or xx') and the product of all q, and x is
    multiplied once, at the end.
    """
    # Rounding leaves small eigenvalues of the square below zero, and each iteration multiplies them
    # by up to 12: harmless in float32, not in what accelerators take for it by default.
    matmul = partial(jnp.matmul, precision="highest")
    a, b, c = NEWTON_SCHULZ
    x = kernel.reshape(-1, kernel.shape[-1])
    x /= jnp.linalg.norm(x) + 1e-8
    tall = x.shape[0] > x.shape[1]
    square = matmul(x.T, x) if tall else matmul(x, x.T)
    product: Any = None
    for _ in range(ITERATIONS):
        q = a * jnp.eye(len(square)) + b * square + c * matmul(square, square)
        product = q if product is None else matmul(q, product)
        square = matmul(matmul(q, square), q)
    return (matmul(x, product) if tall else matmul(product, x)).reshape(kernel.shape)


def _muon_kernels(schedule, *, momentum, weight_decay):
    return optax.chain(
        optax.trace(momentum, nesterov=True),
        optax.stateless(lambda updates, _: jax.tree.map(orthogonalize, updates)),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def _muon(schedule, *, learning_rate, momentum=0.9, weight_decay=0.0, adam_learning_rate=0.01):
    """Muon for convolution kernels, AdamW for all other parameters.

    Args:
        momentum: Muon's, of Nesterov
        weight_decay: times the learning rate, of kernels and matrices
        adam_learning_rate: the peak for all but convolution kernels
    """
    others = optax.adamw(
        lambda step: adam_learning_rate / learning_rate * schedule(step),
        b2=0.99,  # a thousand steps are a long training here
        weight_decay=weight_decay,
        mask=matrices_and_kernels,
    )
    kernels = _muon_kernels(schedule, momentum=momentum, weight_decay=weight_decay)
    labels = lambda params: jax.tree.map(lambda p: "kernels" if p.ndim == 4 else "others", params)
    return optax.partition({"kernels": kernels, "others": others}, labels)


def _muon_sgd(
    schedule,
    *,
    learning_rate,
    momentum=0.9,
    weight_decay=0.0,
    dense_learning_rate=0.02,
    bias_learning_rate=100.0,
):
    """Muon for convolution kernels, SGD for all other parameters, as in airbench94_muon.

    Args:
        momentum: Muon's, of Nesterov
        weight_decay: times the learning rate, of kernels and matrices
        dense_learning_rate: the peak for fully connected layers
        bias_learning_rate: the peak for the other layers' biases and scales
    """

    def sgd(peak):
        return optax.chain(
            optax.trace(0.85, nesterov=True),  # airbench94_muon's; `momentum` is Muon's
            optax.scale(peak / learning_rate),
            optax.add_decayed_weights(weight_decay, matrices_and_kernels),
            optax.scale_by_learning_rate(schedule),
        )

    kernels = _muon_kernels(schedule, momentum=momentum, weight_decay=weight_decay)
    groups = {"dense": sgd(dense_learning_rate), "biases": sgd(bias_learning_rate)}
    return optax.partition(groups | {"kernels": kernels}, kernels_dense_and_biases)


def kernels_dense_and_biases(params: optax.Params) -> optax.Params:
    """Labels each array: those of convolutions, of fully connected layers, and all others.

    A layer is fully connected if its kernel is a matrix. Its bias goes with the kernel.
    """
    flat = flatten_dict(params)

    def label(path):
        kernel = flat.get((*path[:-1], "kernel"))
        if flat[path].ndim == 4:
            return "kernels"
        return "dense" if kernel is not None and kernel.ndim == 2 else "biases"

    return unflatten_dict({path: label(path) for path in flat})


def placed(updates: Any, *, backbone_ratio: float, layer_decay: float) -> Any:
    """Updates times `backbone_ratio`, and times `layer_decay` for each block from the last one down
    (arXiv 2106.08254); those of the last layer as they are."""
    places, block = {}, r"(?:blocks|layer|stages)_?(\d+)(?:_(?:blocks_)?(\d+))?"
    for name in updates:  # a downsampling goes with the block that follows it
        stem = re.match("stem|patch|pos|cls|conv1|bn1|conv_stem", name)
        found = re.match(block, name)
        places[name] = tuple(map(int, found.groups("0"))) if found else (-1 if stem else 999,)
    order = sorted({(-1,), *places.values(), (999,)})  # from the stem to the last norm
    scales = {n: layer_decay ** (len(order) - 1 - order.index(places[n])) for n in updates}
    scales = {n: backbone_ratio * scale for n, scale in scales.items()} | {head_of(updates): 1.0}
    return {name: optax.tree.scale(scales[name], part) for name, part in updates.items()}


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "lion": _lion,
    "muon": _muon,
    "muon_sgd": _muon_sgd,
}


def create_optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    learning_rate: float,
    clip_norm: float = 0.0,
    backbone_ratio: float = 1.0,
    layer_decay: float = 1.0,
    **own: float,
) -> optax.GradientTransformation:
    """The optax chain: gradients clipped to the global norm `clip_norm` (0: never), then `name`.

    Args:
        name: a key of `OPTIMIZERS`.
        schedule: learning rate by number of updates.
        learning_rate: its peak.
        clip_norm: as above.
        backbone_ratio, layer_decay: see `placed`.
        own: the optimiser's keyword arguments.
    """
    optimizer = OPTIMIZERS[name]
    if "learning_rate" in inspect.signature(optimizer).parameters:
        own["learning_rate"] = learning_rate
    tx = optimizer(schedule, **own)
    if (backbone_ratio, layer_decay) != (1, 1):
        scale = partial(placed, backbone_ratio=backbone_ratio, layer_decay=layer_decay)
        tx = optax.chain(tx, optax.stateless(lambda updates, _: scale(updates)))
    return optax.chain(optax.clip_by_global_norm(clip_norm), tx) if clip_norm else tx
