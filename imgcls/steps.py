"""One step of training and of evaluation, as pure functions: bind the static arguments with
`functools.partial`, then `jax.jit`, or `jax.pmap` with `axis_name`.

    Batch = {"image": uint8[B, H, W, C], "label": int32[B], "mask": bool[B]}  # False on padding

Where flips alternate, a training batch also has "mirrored": bool[B].
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from imgcls.state import TrainState
from imgcls.task import Task

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def normalize(images: Any, *, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """uint8 in [0, 255], or float in [0, 1], to float32 less `mean`, over `std`, a channel each."""
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 255
    return (images - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def step_keys(rng: jax.Array, step: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """The keys of a step's augmentation and of its dropout: all of its randomness."""
    augment_rng, dropout_rng = jax.random.split(jax.random.fold_in(rng, step))
    return augment_rng, dropout_rng


def augment_batch(
    rng: jax.Array, batch: Batch, *, augment: Callable[..., Any], task: Task, num_classes: int
) -> tuple[jax.Array, jax.Array]:
    """A batch as the loss sees it: images float32[B, H, W, C] in [0, 1], targets float32[B, K]."""
    if "targets" in batch:  # already, because it is one of features
        return batch["image"], batch["targets"]
    images = batch["image"].astype(jnp.float32) / 255
    if "mirrored" in batch:
        images = jnp.where(batch["mirrored"][:, None, None, None], images[:, :, ::-1], images)
    return augment(rng, images, task.targets(batch["label"], num_classes))


def train_step(
    state: TrainState,
    batch: Batch,
    rng: jax.Array,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    preprocess: Callable[[jax.Array], jax.Array],
    augment: Callable[..., tuple[jax.Array, jax.Array]],
    task: Task,
    ema_decay: float = 0.0,
    accumulate_steps: int = 1,
    unroll: bool = False,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update of the parameters from one batch without padding.

    All randomness comes from (rng, state.step). The gradient is averaged over `accumulate_steps`
    equal parts of the batch, one after the other, so that one part's activations are in memory.
    The result differs where BatchNorm normalises each part alone, or dropout draws for each.
    Where loss or gradient is not finite, only the step counter changes, and the metric "bad" is 1.

    Returns the new state, and sums over the batch: of the task's figures, "count" and "bad".
    """
    if axis_name is not None:
        rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
    augment_rng, dropout_rng = step_keys(rng, state.step)
    images, targets = augment_batch(
        augment_rng, batch, augment=augment, task=task, num_classes=model.num_classes
    )

    def mean_loss(params, batch_stats, images, targets, dropout_rng):
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            preprocess(images),
            train=True,
            rngs={"dropout": dropout_rng},
            mutable=["batch_stats"],
        )
        figures = task.figures(logits, targets, train=True)
        return figures["loss"].mean(), (updated.get("batch_stats", {}), figures)

    def accumulate(carry, part):
        batch_stats, total = carry
        (_, (batch_stats, outputs)), grads = jax.value_and_grad(mean_loss, has_aux=True)(
            state.params, batch_stats, *part
        )
        return (batch_stats, jax.tree.map(jnp.add, total, grads)), outputs

    # Strided parts, not contiguous ones: each device then splits the examples that it holds.
    k = accumulate_steps
    parts = [x.reshape(-1, k, *x.shape[1:]).swapaxes(0, 1) for x in (images, targets)]
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    scan = _unrolled_scan if unroll or k == 1 else jax.lax.scan
    (batch_stats, grads), outputs = scan(
        accumulate, (state.batch_stats, zeros), (*parts, jax.random.split(dropout_rng, k))
    )
    grads = jax.tree.map(lambda g: g / k, grads)
    metrics = jax.tree.map(lambda x: x.astype(jnp.float32).sum(), outputs)
    metrics["count"] = jnp.float32(images.shape[0])
    if axis_name is not None:
        grads, batch_stats = jax.lax.pmean((grads, batch_stats), axis_name)
        metrics = jax.lax.psum(metrics, axis_name)

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        # The average follows closely at first, or it would remember the initialisation.
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema_params = optax.incremental_update(params, ema_params, 1 - decay)
    new_state = state.replace(
        params=params, batch_stats=batch_stats, opt_state=opt_state, ema_params=ema_params
    )
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(optax.tree.norm(grads))
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    metrics = keep(metrics, jax.tree.map(jnp.zeros_like, metrics))
    metrics["bad"] = 1.0 - finite
    return keep(new_state, state).replace(step=state.step + 1), metrics


def _unrolled_scan(body: Callable[..., Any], carry: Any, xs: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` without a loop: inside one, XLA's convolutions are 15 times slower on a CPU.

    `lax.scan(unroll=True)` does not help: it still emits a loop of one iteration.
    """
    leaves, structure = jax.tree.flatten(xs)
    outputs = []
    for x in zip(*leaves):
        carry, output = body(carry, jax.tree.unflatten(structure, x))
        outputs.append(output)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)


def predict_step(
    state: TrainState,
    images: jax.Array,
    *,
    model: nn.Module,
    preprocess: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Images uint8[B, H, W, C] -> logits float32[B, K]."""
    return model.apply(state.eval_variables, preprocess(images), train=False)  # type: ignore


def eval_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    preprocess: Callable[[jax.Array], jax.Array],
    task: Task,
) -> Metrics:
    """The task's figures and "count": sums, never means, over the examples that are not padding."""
    logits = predict_step(state, batch["image"], model=model, preprocess=preprocess)
    targets = task.targets(batch["label"], model.num_classes)
    figures = task.figures(logits, targets, train=False) | {"count": batch["mask"]}
    return {k: jnp.where(batch["mask"], x, 0).sum(dtype=jnp.float32) for k, x in figures.items()}
