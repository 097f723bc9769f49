"""ConvNeXt (arXiv 2201.03545); modules are named as in timm."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class ConvNeXt(nn.Module):
    """ConvNeXt-T by default: normalised [B, H, W, C] -> logits float32 [B, num_classes].

    timm's convnext_nano has widths=(80, 160, 320, 640) and depths=(2, 2, 8, 2).

    Args:
        widths: channels of each stage
        depths: blocks of each stage
        drop_path_rate: of the last block's branch, per image (arXiv 1603.09382)
        dropout_rate: before the fully connected layer
    """

    num_classes: int
    widths: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (3, 3, 9, 3)
    drop_path_rate: float = 0.0
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32
    conv: Callable = nn.Conv
    dense: Callable = nn.Dense

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        norm = partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)
        how = {"dtype": self.dtype, "kernel_init": nn.initializers.truncated_normal(0.02)}
        conv, dense = partial(self.conv, **how), partial(self.dense, **how)
        rates = iter(np.linspace(0, self.drop_path_rate, sum(self.depths)).tolist())
        gelu = lambda y: nn.gelu(y.astype(jnp.float32), approximate=False)
        x = norm(name="stem_1")(conv(self.widths[0], (4, 4), 4, "VALID", name="stem_0")(x))
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            if stage:
                x = norm(name=f"stages_{stage}_downsample_0")(x)
                x = conv(width, (2, 2), 2, "VALID", name=f"stages_{stage}_downsample_1")(x)
            for i in range(depth):
                block, every = f"stages_{stage}_blocks_{i}", {"feature_group_count": width}
                y = conv(width, (7, 7), **every, name=f"{block}_conv_dw")(x)
                y = dense(4 * width, name=f"{block}_mlp_fc1")(norm(name=f"{block}_norm")(y))
                y = dense(width, name=f"{block}_mlp_fc2")(gelu(y))
                gamma = self.param(f"{block}_gamma", nn.initializers.constant(1e-6), (width,))
                drop_path = nn.Dropout(next(rates), (1, 2, 3), deterministic=not train)
                x = x + drop_path(y * gamma.astype(y.dtype))
        x = norm(name="head_norm")(x.mean((1, 2)))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x.astype(jnp.float32))
        return nn.Dense(self.num_classes, name="head")(x)
