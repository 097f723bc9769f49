"""The state of training: arrays alone, so that checkpoints, shardings and donation are obvious."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax


class TrainState(flax.struct.PyTreeNode):
    step: jax.Array  # int32[], batches seen
    params: Any
    batch_stats: Any  # running means and variances of BatchNorm; {} without
    opt_state: Any
    ema_params: Any  # exponential moving average of params; None when off

    @property
    def eval_variables(self) -> dict[str, Any]:
        """What evaluation applies the model to: the average of the parameters where it is kept."""
        params = self.params if self.ema_params is None else self.ema_params
        return {"params": params, "batch_stats": self.batch_stats}


def create_state(
    rng: jax.Array,
    sample_images: jax.Array,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    ema: bool = False,
) -> TrainState:
    """Initialises `model` on normalised training images [B, H, W, C], from which it may learn
    statistics."""
    variables = model.init(rng, sample_images, train=False)
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=tx.init(params),
        # A copy: one buffer under two names could not be donated.
        ema_params=jax.tree.map(jnp.copy, params) if ema else None,
    )


def count_parameters(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
