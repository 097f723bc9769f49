"""Steps of the probe, in which the last layer of a model that has learned before learns alone."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from imgcls.models import head_of
from imgcls.state import TrainState
from imgcls.steps import Batch, Metrics, predict_step, train_step


class LastLayer(nn.Module):
    """The last layer of a model alone: features float32[B, D] -> logits float32[B, K]."""

    num_classes: int
    layer: str

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return nn.Dense(self.num_classes, name=self.layer)(x)


def features_step(state: TrainState, images: jax.Array, **how: Any) -> jax.Array:
    """As `predict_step`, but what the last layer is given: float32[B, D]."""
    seen, layer = [], (head_of(state.params),)

    def keep(call, arguments, keywords, context):
        seen.extend(arguments[:1] if context.module.path == layer else ())
        return call(*arguments, **keywords)

    with nn.intercept_methods(keep):
        predict_step(state, images, **how)
    return seen[-1].astype(jnp.float32)


def frozen_step(
    state: TrainState, batch: Batch, rng: jax.Array, *, model: Any, **how: Any
) -> tuple[TrainState, Metrics]:
    """`train_step` of a `LastLayer` on features, after which no other parameters have changed."""
    after, metrics = train_step(state, batch, rng, model=model, preprocess=lambda x: x, **how)

    def kept(path, new, old):  # counters change, too
        names = {getattr(key, "key", "") for key in path}
        return old if names & state.params.keys() and model.layer not in names else new

    return jax.tree_util.tree_map_with_path(kept, after, state), metrics


def restarted_step(
    state: TrainState, batch: Batch, rng: jax.Array, *, at: int, tx: Any, **how: Any
) -> tuple[TrainState, Metrics]:
    """`train_step`, but the optimiser begins anew at the step `at`."""
    anew = lambda new, old: jnp.where(state.step == at, new, old)
    state = state.replace(opt_state=jax.tree.map(anew, tx.init(state.params), state.opt_state))
    return train_step(state, batch, rng, tx=tx, **how)
