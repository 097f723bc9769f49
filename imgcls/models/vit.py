"""Vision transformers, as in arXiv 2010.11929 or DINOv2 (2304.07193); modules named as in timm."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class Block(nn.Module):
    """Attention among tokens, then a perceptron on each: [B, T, width] -> the same shape."""

    heads: int
    layer_scale: bool
    drop_path_rate: float
    norm: Callable
    dense: Callable

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        width, norm, dense = x.shape[-1], self.norm, self.dense
        drop_path = nn.Dropout(self.drop_path_rate, (1, 2), deterministic=not train)

        def scaled(y, name):
            if self.layer_scale:
                y *= self.param(name, nn.initializers.constant(1e-5), (width,)).astype(y.dtype)
            return drop_path(y)

        y = dense(3 * width, name="attn_qkv")(norm(name="norm1")(x))
        parts = (jax.lax.slice_in_dim(y, i * width, (i + 1) * width, axis=2) for i in range(3))
        y = jax.nn.dot_product_attention(*(p.reshape(*x.shape[:2], self.heads, -1) for p in parts))
        x = x + scaled(dense(width, name="attn_proj")(y.reshape(x.shape)), "ls1_gamma")
        y = nn.gelu(dense(4 * width, name="mlp_fc1")(norm(name="norm2")(x)), approximate=False)
        return x + scaled(dense(width, name="mlp_fc2")(y), "ls2_gamma")


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

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        norm = partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
        patch = {"kernel_size": (self.patch,) * 2, "strides": self.patch, "padding": "VALID"}
        x = self.conv(self.width, **patch, dtype=self.dtype, name="patch_embed_proj")(x)
        x = jnp.pad(
            x.reshape(x.shape[0], -1, self.width), ((0, 0), (int(self.class_token), 0), (0, 0))
        )
        place = self.param("pos_embed", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        if self.class_token:
            token = self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, self.width))
            place = place + jnp.pad(token, ((0, 0), (0, x.shape[1] - 1), (0, 0)))
        x = x + place.astype(self.dtype)
        for i, rate in enumerate(np.linspace(0, self.drop_path_rate, self.depth).tolist()):
            block = Block(self.heads, self.layer_scale, rate, norm, dense, name=f"blocks_{i}")
            x = block(x, train=train)
        tokens = 1 if self.class_token else x.shape[1]
        x = jax.lax.slice_in_dim(norm(name="norm")(x), 0, tokens, axis=1).mean(1)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x.astype(jnp.float32))
        return nn.Dense(self.num_classes, name="head")(x)
