"""Learning-rate schedules and optimisers, from explicit arguments. Steps are parameter updates."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

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
    name: str, *, learning_rate: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Rises linearly from zero to `learning_rate` in `warmup_steps`, then follows `name`."""
    after = SCHEDULES[name](learning_rate, max(total_steps - warmup_steps, 1))
    if warmup_steps == 0:
        return after
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def matrices_and_kernels(params: optax.Params) -> optax.Params:
    """True for what weight decay applies to: not biases, and not the norms' scales."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def _sgd(schedule, *, momentum, weight_decay):
    # Decay joins the gradient before the momentum: the L2 penalty of the classic recipes.
    return optax.chain(
        optax.add_decayed_weights(weight_decay, matrices_and_kernels),
        optax.sgd(schedule, momentum=momentum or None, nesterov=momentum > 0),
    )


def _adamw(schedule, *, momentum, weight_decay):
    return optax.adamw(schedule, b1=momentum, weight_decay=weight_decay, mask=matrices_and_kernels)


def _lion(schedule, *, momentum, weight_decay):
    return optax.lion(schedule, b1=momentum, weight_decay=weight_decay, mask=matrices_and_kernels)


def orthogonalize(kernel: jax.Array) -> jax.Array:
    """Muon's update (Jordan et al., 2024): singular values brought near one, but for tiny ones.

    Those of a kernel [H, W, I, O] as the matrix x [H * W * I, O]. An iteration x <- x q(x'x) has
    two products with x, the largest matrix; here only the small square x'x (or xx') goes through
    them, with the product of all q, and x is multiplied once in the end.
    """
    # Rounding leaves small eigenvalues of the square below zero, and each iteration multiplies them
    # by up to 12: harmless in float32, not in what accelerators take for it by default.
    matmul = partial(jnp.matmul, precision="highest")
    a, b, c = NEWTON_SCHULZ
    x = kernel.reshape(-1, kernel.shape[-1])
    x /= jnp.linalg.norm(x) + 1e-8
    tall = x.shape[0] > x.shape[1]
    square = matmul(x.T, x) if tall else matmul(x, x.T)
    product = None
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


def _muon(schedule, *, momentum, weight_decay, adam_ratio=1.0):
    """Muon for convolution kernels, AdamW for all other parameters.

    AdamW's learning rate is `adam_ratio` times Muon's.
    """
    others = optax.adamw(
        lambda step: adam_ratio * schedule(step),
        b2=0.99,  # a thousand steps are a long training here
        weight_decay=weight_decay,
        mask=matrices_and_kernels,
    )
    kernels = _muon_kernels(schedule, momentum=momentum, weight_decay=weight_decay)
    labels = lambda params: jax.tree.map(lambda p: "kernels" if p.ndim == 4 else "others", params)
    return optax.partition({"kernels": kernels, "others": others}, labels)


def _muon_sgd(schedule, *, momentum, weight_decay, dense_ratio=1.0, bias_ratio=1.0):
    """Muon for convolution kernels, SGD for all other parameters, as in airbench94_muon.

    SGD's learning rates are `dense_ratio` (fully connected layers) and `bias_ratio` (the biases and
    scales of the others) times Muon's.
    """

    def sgd(ratio):
        return optax.chain(
            optax.trace(0.85, nesterov=True),  # airbench94_muon's; `momentum` is Muon's
            optax.scale(ratio),
            optax.add_decayed_weights(weight_decay, matrices_and_kernels),
            optax.scale_by_learning_rate(schedule),
        )

    def label(path, parameter):
        if parameter.ndim == 4:
            return "kernels"
        return "dense" if "Dense" in jax.tree_util.keystr(path) else "biases"

    kernels = _muon_kernels(schedule, momentum=momentum, weight_decay=weight_decay)
    return optax.partition(
        {"kernels": kernels, "dense": sgd(dense_ratio), "biases": sgd(bias_ratio)},
        lambda params: jax.tree_util.tree_map_with_path(label, params),
    )


OPTIMIZERS = {
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
    momentum: float,
    weight_decay: float,
    clip_norm: float,
    **options: float,
) -> optax.GradientTransformation:
    """The optax chain: gradients clipped to the global norm `clip_norm` (0: never), then `name`.

    `momentum` is the decay of the gradient's average: Nesterov momentum of sgd and muon, b1 of
    adamw and lion. Weight decay is coupled (L2) in sgd and decoupled in the others. `options` are
    those that one optimiser has alone: muon's `adam_ratio`, muon_sgd's `dense_ratio`, `bias_ratio`.
    """
    tx = OPTIMIZERS[name](schedule, momentum=momentum, weight_decay=weight_decay, **options)
    return optax.chain(optax.clip_by_global_norm(clip_norm), tx) if clip_norm else tx
