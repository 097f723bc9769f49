"""What augmentations do to the pixels of images float[B, H, W, C] in [0, 1]."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, in ITU-R BT.601


def interpolate(images: Array, rows: Array, columns: Array) -> Array:
    """Images at positions in pixels: bilinear, reflecting at the edges.

    Positions are float32[B, H', W']. Where an axis moves as a whole, rows are [B, H', 1] and
    columns [B, 1, W']: quicker on a TPU.
    """
    return jax.lax.platform_dependent(
        images, rows, columns, tpu=multiplied, default=_interpolate_gathered
    )


def _interpolate_gathered(images: Array, rows: Array, columns: Array) -> Array:
    rows, columns = jnp.broadcast_arrays(rows, columns)
    _, height, width, _ = images.shape
    rows, columns = reflect(rows, height), reflect(columns, width)
    top, left = rows.astype(jnp.int32), columns.astype(jnp.int32)
    bottom, right = jnp.minimum(top + 1, height - 1), jnp.minimum(left + 1, width - 1)
    down, across = (rows - jnp.floor(rows))[..., None], (columns - jnp.floor(columns))[..., None]
    pixels = images.astype(jnp.float32)
    upper = (1 - across) * _take(pixels, top, left) + across * _take(pixels, top, right)
    lower = (1 - across) * _take(pixels, bottom, left) + across * _take(pixels, bottom, right)
    return ((1 - down) * upper + down * lower).astype(images.dtype)


def multiplied(images: Array, rows: Array, columns: Array) -> Array:
    """`interpolate` by products of matrices, because a TPU gathers pixel by pixel.

    Whole positions give the pixels exactly.
    """
    _, height, width, channels = images.shape
    apart = rows.shape[2] == 1 == columns.shape[1]
    if not apart and height * width * width * channels > 2**20:  # of an image's `lines`
        return _interpolate_gathered(images, rows, columns)
    whole = lambda size: jnp.arange(size, dtype=jnp.float32)[None, None, None]
    share = lambda positions, size: jnp.maximum(
        1 - jnp.abs(reflect(positions, size)[..., None] - whole(size)), 0
    )
    down, across, pixels = share(rows, height), share(columns, width), images.astype(jnp.float32)
    exact = partial(jnp.einsum, precision="highest")
    lines = exact("byxr,brck->byxck", down, pixels)  # x has one value where axes move apart
    terms = (lines[:, :, 0], across[:, 0]) if apart else (lines, across)
    return exact("byck,bxc->byxk" if apart else "byxck,byxc->byxk", *terms).astype(images.dtype)


def reflect(positions: Array, size: int) -> Array:
    """Folds positions beyond [0, size - 1] back like numpy's "reflect": edges are not repeated."""
    period = max(2 * (size - 1), 1)
    positions = jnp.abs(positions) % period
    return jnp.minimum(positions, period - positions)


def gather(images: Array, rows: Array, columns: Array) -> Array:
    """images[b, rows[b], columns[b]], of int32 indices that broadcast to [B, H', W']."""
    by_products = lambda images, *at: multiplied(images, *(a.astype(jnp.float32) for a in at))
    return jax.lax.platform_dependent(images, rows, columns, tpu=by_products, default=_take)


def _take(images: Array, rows: Array, columns: Array) -> Array:
    """`gather` as one that XLA can shard along the batch."""
    return jax.vmap(lambda image, row, column: image[row, column])(images, rows, columns)


def blurred(images: Array) -> Array:
    """Each inner pixel with its neighbours, weighted 5 to 1 each, as Pillow's SMOOTH."""
    rows = images[:, :-2] + images[:, 1:-1] + images[:, 2:]
    box = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inner = (box + 4 * images[:, 1:-1, 1:-1]) / 13
    return images.at[:, 1:-1, 1:-1].set(inner)


def equalized(images: Array) -> Array:
    """Each channel's pixels, in 256 levels, by the share of pixels that are darker."""

    def equalize(channel: Array) -> Array:
        level = jnp.round(channel * 255).astype(jnp.int32)
        counts = jnp.bincount(level.reshape(-1), length=256)
        darker = (jnp.cumsum(counts) - counts)[level]
        return jnp.where(darker.max() > 0, darker / darker.max(), channel)

    return jax.vmap(jax.vmap(equalize, in_axes=-1, out_axes=-1))(images)
