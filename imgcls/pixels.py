"""What augmentations do to the pixels of images float[B, H, W, C] in [0, 1]."""

import jax
import jax.numpy as jnp
from jax import Array

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, in ITU-R BT.601


def interpolate(images: Array, rows: Array, columns: Array) -> Array:
    """Images at positions float32[B, H', W'], in pixels: bilinear, reflecting at the edges."""
    _, height, width, _ = images.shape
    rows, columns = reflect(rows, height), reflect(columns, width)
    top, left = rows.astype(jnp.int32), columns.astype(jnp.int32)
    bottom, right = jnp.minimum(top + 1, height - 1), jnp.minimum(left + 1, width - 1)
    down, across = (rows - jnp.floor(rows))[..., None], (columns - jnp.floor(columns))[..., None]
    pixels = images.astype(jnp.float32)
    upper = (1 - across) * gather(pixels, top, left) + across * gather(pixels, top, right)
    lower = (1 - across) * gather(pixels, bottom, left) + across * gather(pixels, bottom, right)
    return ((1 - down) * upper + down * lower).astype(images.dtype)


def reflect(positions: Array, size: int) -> Array:
    """Folds positions beyond [0, size - 1] back like numpy's "reflect": edges are not repeated."""
    period = max(2 * (size - 1), 1)
    positions = jnp.abs(positions) % period
    return jnp.minimum(positions, period - positions)


def gather(images: Array, rows: Array, columns: Array) -> Array:
    """images[b, rows[b], columns[b]], as a gather that XLA can shard along the batch."""
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
