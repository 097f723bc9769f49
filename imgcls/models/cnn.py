"""The convolutional network of the textbooks, and its control without convolutions."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

LAYOUT = ("NHWC", "HWIO", "NHWC")


def whitening_filters(images: jax.Array, *, eps: float = 5e-4) -> jax.Array:
    """Filters whose responses to 2x2 patches of `images` are uncorrelated, with unit variance.

    The eigenvectors of the patches' covariance over the roots of its eigenvalues, and their
    negatives, for an activation that passes one sign (arXiv 2404.00498, section 3.2).

    Args:
        images: float[B, H, W, C], normalised.
        eps: added to the eigenvalues, so that flat images do not divide by zero.

    Returns:
        float32[2, 2, C, 8 C].
    """
    patches = jax.lax.conv_general_dilated_patches(
        images.astype(jnp.float32), (2, 2), (1, 1), "VALID", dimension_numbers=LAYOUT
    )  # float[B, H - 1, W - 1, C * 4], the channel outermost
    channels = images.shape[-1]
    patches = patches.reshape(-1, 4 * channels)
    patches -= patches.mean(0)
    values, vectors = jnp.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / jnp.sqrt(values + eps)).reshape(channels, 2, 2, 4 * channels)
    filters = filters.transpose(1, 2, 0, 3)
    return jnp.concatenate([filters, -filters], axis=-1)


def partial_identity(
    rng: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """A kernel [H, W, I, O] whose first min(I, O) outputs are the inputs, the others random.

    What is known of the image then reaches the last layer from the first step on
    (arXiv 2404.00498, section 3.3).
    """
    height, width, inputs, outputs = shape
    same = jnp.arange(min(inputs, outputs))
    kernel = nn.initializers.lecun_normal()(rng, shape, dtype).at[..., same].set(0)
    return kernel.at[height // 2, width // 2, same, same].set(1)


def max_pool(x: jax.Array) -> jax.Array:
    """The maxima of 2x2 windows without overlap: [B, H, W, C] -> [B, H // 2, W // 2, C]."""
    return nn.max_pool(x, (2, 2), (2, 2))


class CNN(nn.Module):
    """Blocks of convolution, max-pooling, BatchNorm and GELU, then fully connected layers.

    Each block halves the image: its first convolution is followed by 2x2 max-pooling, and pooling
    comes before normalisation and activation, since both then work on a quarter of the values.
    That, BatchNorm with a bias and no scale, and convolutions that start as partial identities are
    as in Keller Jordan's airbench (arXiv 2404.00498). What is left of the image after the last
    block is max-pooled to one vector, so any image of at least `2 ** len(widths)` pixels a side
    will do: two blocks suit 8x8 digits, six suit 224x224 photographs.

    With `whiten`, a first layer of fixed filters decorrelates the pixels of each 2x2 patch; it is
    initialised from the images that the model is initialised on (see `whitening_filters`). It makes
    an image smaller by one pixel a side, and pooling then drops the last row and column of each odd
    size (31 to 15, 7 and 3); with `pad_whitening`, the size stays even (32 to 16, 8 and 4).

    Args:
        widths: output channels of each block
        convs_per_block: convolutions in each block
        dense_widths: widths of the hidden fully connected layers
        dropout_rate: before every fully connected layer
        whiten: add a fixed first layer that decorrelates 2x2 patches
        pad_whitening: pad it with zeros, so that the image keeps its size
        small_logits: start the last layer near zero
        norm_momentum: of BatchNorm's running mean and variance

    Normalised images [B, H, W, C] -> logits float32 [B, num_classes].
    """

    num_classes: int
    widths: tuple[int, ...] = (64, 256, 256)
    convs_per_block: int = 2
    dense_widths: tuple[int, ...] = ()
    dropout_rate: float = 0.0
    whiten: bool = False
    pad_whitening: bool = False
    small_logits: bool = False
    norm_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32  # of the computation; parameters stay float32
    conv: Callable = nn.Conv
    norm: Callable = nn.BatchNorm
    pool: Callable = max_pool
    act: Callable = nn.gelu

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv = partial(self.conv, use_bias=False, kernel_init=partial_identity, dtype=self.dtype)
        norm = partial(self.norm, use_running_average=not train, momentum=self.norm_momentum)
        if self.whiten:
            # A statistic of the data: kept with BatchNorm's, out of the optimiser's reach. Computed
            # in float32: it enlarges small differences, which rounded pixels would not have.
            kernel = self.variable("batch_stats", "whitening", lambda: whitening_filters(x))
            padding = "SAME" if self.pad_whitening else "VALID"
            x = jax.lax.conv_general_dilated(
                x.astype(jnp.float32), kernel.value, (1, 1), padding, dimension_numbers=LAYOUT
            )
            bias = self.param("whitening_bias", nn.initializers.zeros, (x.shape[-1],))
            x = self.act(x + bias)
        x = x.astype(self.dtype)
        for width in self.widths:
            for i in range(self.convs_per_block):
                x = conv(width, kernel_size=(3, 3))(x)
                if i == 0:
                    x = self.pool(x)
                x = self.act(norm(use_scale=False, dtype=self.dtype)(x))
        x = x.max((1, 2))
        return _head(self, x, train=train, small_logits=self.small_logits)


class MLP(nn.Module):
    """Fully connected layers alone: what convolution buys is measured against it.

    Args:
        dense_widths: widths of the hidden layers
        dropout_rate: before every layer
    """

    num_classes: int
    dense_widths: tuple[int, ...] = (512, 512)
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32
    act: Callable = nn.gelu

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return _head(self, x.reshape(x.shape[0], -1).astype(self.dtype), train=train)


def _head(model: CNN | MLP, x: jax.Array, *, train: bool, small_logits: bool = False) -> jax.Array:
    """The fully connected layers: features [B, F] -> logits float32 [B, num_classes]."""
    dropout = partial(nn.Dropout, model.dropout_rate, deterministic=not train)
    for width in model.dense_widths:
        x = model.act(nn.Dense(width, dtype=model.dtype)(dropout()(x)))
    x = dropout()(x).astype(jnp.float32)
    # Near zero, as in airbench94_muon: without it, its SGD was far behind (docs/recipes.md).
    small = nn.initializers.normal(1 / x.shape[-1])
    kernel_init = small if small_logits else nn.initializers.lecun_normal()
    return nn.Dense(model.num_classes, kernel_init=kernel_init)(x)
