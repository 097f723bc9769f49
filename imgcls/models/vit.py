"""Vision transformers, as in arXiv 2010.11929 or DINOv2 (2304.07193); modules named as in timm."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class ViT(nn.Module):
    """ViT-S/16 by default: normalised [B, H, W, C] -> logits float32 [B, num_classes].

    It is made for one size of images. DINOv2's ViT-S/14 has patch=14 and layer_scale=True.

    Args:
        patch: side of a patch in pixels
        width: features per token, a multiple of heads
        depth: blocks
        heads: of attention
        layer_scale: scale each branch of a block by learned factors (arXiv 2103.17239)
        class_token: classify an extra token; False: the mean of the patches' tokens
        drop_path_rate: of the last block's branches, per image (arXiv 1603.09382)
        dropout_rate: before the fully connected layer
    """

    num_classes: int
    patch: int = 16
    width: int = 384
    depth: int = 12
    heads: int = 6
    layer_scale: bool = False
    class_token: bool = True
    drop_path_rate: float = 0.0
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32
    conv: Callable = nn.Conv
    dense: Callable = nn.Dense
    over_images: Callable = jax.vmap

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        width, side = self.width, (self.patch, self.patch)
        norm = partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)
        dense = partial(self.dense, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
        gelu = lambda y: nn.gelu(y.astype(jnp.float32), approximate=False)  # faster on CPUs

        def attend(y):  # one image's queries, keys and values: [tokens, 3 * width]
            y, n = y.reshape(y.shape[0], 3 * self.heads, -1), self.heads
            parts = (jax.lax.slice_in_dim(y, i * n, (i + 1) * n, axis=1) for i in range(3))
            return jax.nn.dot_product_attention(*parts).reshape(-1, width)

        def scaled(y, rate, name):
            if self.layer_scale:
                y *= self.param(name, nn.initializers.constant(1e-5), (width,)).astype(y.dtype)
            return nn.Dropout(rate, (1, 2), deterministic=not train)(y)

        x = self.conv(width, side, side, "VALID", dtype=self.dtype, name="patch_embed_proj")(x)
        x = jnp.pad(x.reshape(x.shape[0], -1, width), ((0, 0), (int(self.class_token), 0), (0, 0)))
        place = self.param("pos_embed", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        if self.class_token:
            token = self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, width))
            place = place + jnp.pad(token, ((0, 0), (0, x.shape[1] - 1), (0, 0)))
        x = x + place.astype(self.dtype)
        for i, rate in enumerate(np.linspace(0, self.drop_path_rate, self.depth).tolist()):
            block = f"blocks_{i}"
            y = dense(3 * width, name=f"{block}_attn_qkv")(norm(name=f"{block}_norm1")(x))
            y = dense(width, name=f"{block}_attn_proj")(self.over_images(attend)(y))
            x = x + scaled(y, rate, f"{block}_ls1_gamma")
            y = dense(4 * width, name=f"{block}_mlp_fc1")(norm(name=f"{block}_norm2")(x))
            y = dense(width, name=f"{block}_mlp_fc2")(gelu(y))
            x = x + scaled(y, rate, f"{block}_ls2_gamma")
        tokens = 1 if self.class_token else x.shape[1]
        x = jax.lax.slice_in_dim(norm(name="norm")(x), 0, tokens, axis=1).mean(1)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x.astype(jnp.float32))
        return nn.Dense(self.num_classes, name="head")(x)
