"""Random augmentation in pure JAX: on the device, inside the compiled training step.

Every augmentation is a function `(rng, images, labels, strength) -> (images, labels)` of

    rng       a PRNG key, used up by the call
    images    float[B, H, W, C] in [0, 1], of any float dtype, which is kept
    labels    float32[B, K], one-hot or soft: rows sum to one
    strength  a Python number whose unit is in the name of its config key; 0 is the identity

Keyword arguments with defaults are config keys, too. Their meanings are read from the docstring:
that of the strength is its first line, those of the others stand under Args.

Each example has a draw of its own. Only mixup and cutmix look at other examples, so nothing else
communicates when the batch is sharded over devices.
"""

import inspect
import math
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from imgcls.pixels import LUMA, blurred, equalized, gather, interpolate, reflect

Examples = tuple[Array, Array]
Augment = Callable[[Array, Array, Array], Examples]


def flip(rng: Array, images: Array, labels: Array, probability: float) -> Examples:
    """Mirrors left and right with the given probability."""
    coin = jax.random.bernoulli(rng, float(probability), (len(images), 1, 1, 1))
    return jnp.where(coin, images[:, :, ::-1], images), labels


def rotate(rng: Array, images: Array, labels: Array, degrees: float) -> Examples:
    """Rotates about the centre by an angle uniform in [-degrees, degrees]."""
    return rotate_and_zoom(rng, rng, images, labels, degrees, 0)


def zoom(rng: Array, images: Array, labels: Array, fraction: float) -> Examples:
    """Scales by a factor log-uniform in [1 / (1 + fraction), 1 + fraction]: in as often as out."""
    return rotate_and_zoom(rng, rng, images, labels, 0, fraction)


def rotate_and_zoom(
    turn_rng: Array, zoom_rng: Array, images: Array, labels: Array, degrees: float, fraction: float
) -> Examples:
    """Both, with the draws that each has alone, interpolated once: sharper and cheaper than twice.

    (XLA fuses a gather into the next, and so computes the first anew for each corner of a pixel.)
    """
    radians = _uniform(turn_rng, images, math.radians(degrees))
    scales = jnp.exp(_uniform(zoom_rng, images, math.log1p(fraction)))
    return resample(images, radians, scales), labels


def resample(images: Array, radians: Array, scales: Array) -> Array:
    """Rotates counter-clockwise and enlarges about the centre: bilinear, reflecting at the edges.

    Args:
        images: float[B, H, W, C].
        radians: float32[B]. Multiples of a quarter turn of a square image are exact.
        scales: float32[B]. 2 shows the middle half of each axis, 1/2 all of it and as much again.
    """
    batch, height, width, _ = images.shape
    # In float32 the cosine of a quarter turn is -4e-8: rounded to 2**-20, it is zero.
    turns = jnp.stack([jnp.cos(radians), jnp.sin(radians)])
    cos, sin = (jnp.round(turns * 2**20) / 2**20 / scales[None]).reshape(2, batch, 1, 1)
    y = (jnp.arange(height, dtype=jnp.float32) - (height - 1) / 2)[None, :, None]
    x = (jnp.arange(width, dtype=jnp.float32) - (width - 1) / 2)[None, None, :]
    rows, columns = cos * y + sin * x, cos * x - sin * y
    return interpolate(images, rows + (height - 1) / 2, columns + (width - 1) / 2)


def crop(rng: Array, images: Array, labels: Array, fraction: float) -> Examples:
    """Cuts off up to this fraction of the area, and enlarges what is left. arXiv 1409.4842

    The area that is left is uniform in [1 - fraction, 1]. Its width over its height is log-uniform
    in [3/4, 4/3] of the image's, as far as it fits, and its place is uniform.
    """
    batch, height, width, _ = images.shape
    area_rng, ratio_rng, place_rng = jax.random.split(rng, 3)
    area = jax.random.uniform(area_rng, (batch, 1), jnp.float32, 1 - fraction, 1)
    ratio = jnp.exp(_uniform(ratio_rng, images, math.log(4 / 3)))[:, None]
    ratio = jnp.clip(ratio, area, 1 / area)
    tall, wide = jnp.sqrt(area / ratio), jnp.sqrt(area * ratio)
    top, left = jax.random.uniform(place_rng, (2, batch, 1)) * (1 - jnp.stack([tall, wide]))
    y, x = (jnp.arange(size, dtype=jnp.float32)[None] + 0.5 for size in (height, width))
    rows, columns = top * height + tall * y - 0.5, left * width + wide * x - 0.5
    return interpolate(images, rows[:, :, None], columns[:, None, :]), labels


def rand_augment(
    rng: Array, images: Array, labels: Array, magnitude: float, *, rand_augment_layers: int = 2
) -> Examples:
    """Applies random operations of this magnitude, 10 being the strongest. arXiv 1909.13719

    Args:
        rand_augment_layers: operations per image, one after the other
    """
    for layer in range(rand_augment_layers if magnitude else 0):
        which_rng, sign_rng = jax.random.split(jax.random.fold_in(rng, layer))
        which = jax.random.randint(which_rng, (len(images),), 0, len(OPERATIONS))
        sign = jax.random.rademacher(sign_rng, (len(images),), jnp.float32)
        images = operate(images, which, sign * magnitude / 10)
    return images, labels


def operate(images: Array, which: Array, level: Array) -> Array:
    """One of OPERATIONS (int32[B]) per image, in the ranges of AutoAugment.

    `level` is float32[B] in [-1, 1]; where a sign has no meaning it is ignored. Operations that
    move pixels reflect at the edges, as all augmentations here do.
    """
    _, height, width, _ = images.shape
    which, sign = which[:, None, None, None], level[:, None, None, None]
    level = jnp.abs(sign)
    is_ = lambda name: which == OPERATIONS.index(name)
    moved = lambda name, amount: jnp.where(is_(name), amount * sign, 0)[..., 0]
    y = (jnp.arange(height, dtype=jnp.float32) - (height - 1) / 2)[None, :, None]
    x = (jnp.arange(width, dtype=jnp.float32) - (width - 1) / 2)[None, None, :]
    radians = moved("rotate", math.radians(30))
    rows = jnp.cos(radians) * y + (jnp.sin(radians) + moved("shear_y", 0.3)) * x
    columns = jnp.cos(radians) * x - (jnp.sin(radians) - moved("shear_x", 0.3)) * y
    rows += moved("translate_y", 0.45 * height) + (height - 1) / 2
    columns += moved("translate_x", 0.45 * width) + (width - 1) / 2
    pixels = interpolate(images.astype(jnp.float32), rows, columns)

    away_from = lambda other: pixels + 0.9 * sign * (pixels - other)
    gray = (pixels @ jnp.array(LUMA) if pixels.shape[-1] == 3 else pixels.mean(-1))[..., None]
    step = 2.0 ** jnp.round(4 * level)  # from 8 bits to 4
    low, high = pixels.min((1, 2), keepdims=True), pixels.max((1, 2), keepdims=True)
    results = {
        "brightness": away_from(0.0),
        "color": away_from(gray),
        "contrast": away_from(gray.mean((1, 2), keepdims=True)),
        "sharpness": away_from(blurred(pixels)),
        "solarize": jnp.where(pixels < 1 - level, pixels, 1 - pixels),
        "posterize": jnp.floor(jnp.round(pixels * 255) / step) * step / 255,
        "autocontrast": jnp.where(high > low, (pixels - low) / (high - low), pixels),
        "equalize": equalized(pixels),
    }
    for name, result in results.items():
        pixels = jnp.where(is_(name), jnp.clip(result, 0, 1), pixels)
    return pixels.astype(images.dtype)


def translate(rng: Array, images: Array, labels: Array, pixels: int) -> Examples:
    """Shifts each axis by a whole number uniform in [-pixels, pixels], reflecting at the edges.

    The same as a random crop of the image padded by `pixels` in mode "reflect".
    """
    batch, height, width, _ = images.shape
    down, right = jax.random.randint(rng, (2, batch, 1), -int(pixels), int(pixels) + 1)
    rows = reflect(jnp.arange(height)[None] + down, height)
    columns = reflect(jnp.arange(width)[None] + right, width)
    return gather(images, rows[:, :, None], columns[:, None, :]), labels


def brightness(rng: Array, images: Array, labels: Array, delta: float) -> Examples:
    """Adds a number uniform in [-delta, delta] to the whole image, and clips to [0, 1]."""
    return _shift(rng, images, jnp.ones_like(images), delta), labels


def contrast(rng: Array, images: Array, labels: Array, change: float) -> Examples:
    """Scales the distance from each channel's mean by 1 + uniform in [-change, change]; clips."""
    return _shift(rng, images, images - images.mean((1, 2), keepdims=True), change), labels


def saturation(rng: Array, images: Array, labels: Array, change: float) -> Examples:
    """Scales the distance from gray by 1 + uniform in [-change, change]; clips.

    Gray is the luma of ITU-R BT.601. Images that are not RGB pass unchanged.
    """
    if images.shape[-1] != 3:
        return images, labels
    red, green, blue = jnp.split(images, 3, axis=-1)
    gray = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    return _shift(rng, images, images - gray, change), labels


def cutout(rng: Array, images: Array, labels: Array, pixels: int) -> Examples:
    """Blanks a square of side `pixels` about a random pixel, cut off at the edges.

    DeVries and Taylor, arXiv 1708.04552. Where they fill with the mean of the data (zero, after
    their normalisation), each image is filled with its own mean, channel by channel.
    """
    square = _boxes(rng, images, *jnp.full((2, len(images)), int(pixels)))
    return jnp.where(square, images.mean((1, 2), keepdims=True), images), labels


def erase(rng: Array, images: Array, labels: Array, probability: float) -> Examples:
    """Fills a rectangle with noise, with the given probability. arXiv 1708.04896

    Its area is uniform in [0.02, 0.4] of the image's, and its height over its width log-uniform in
    [0.3, 1 / 0.3]. It is cut off at the edges.
    """
    coin_rng, area_rng, ratio_rng, box_rng, fill_rng = jax.random.split(rng, 5)
    batch, height, width, _ = images.shape
    area = jax.random.uniform(area_rng, (batch,), jnp.float32, 0.02, 0.4) * height * width
    ratio = jnp.exp(_uniform(ratio_rng, images, math.log(1 / 0.3)))
    sides = jnp.round(jnp.sqrt(jnp.stack([area * ratio, area / ratio]))).astype(jnp.int32)
    coin = jax.random.bernoulli(coin_rng, float(probability), (batch, 1, 1, 1))
    noise = jax.random.uniform(fill_rng, images.shape, images.dtype)
    return jnp.where(coin & _boxes(box_rng, images, *sides), noise, images), labels


def mixup(rng: Array, images: Array, labels: Array, alpha: float) -> Examples:
    """Averages two examples, images and labels, weighted by Beta(alpha, alpha). arXiv 1710.09412"""
    return _mix(images, labels, _beta(rng, images, alpha))


def cutmix(rng: Array, images: Array, labels: Array, alpha: float) -> Examples:
    """Pastes a box of another image, and mixes labels by the share of pixels. arXiv 1905.04899

    The share is drawn from Beta(alpha, alpha); the box is then cut off at the edges.
    """
    return _mix(images, labels, _pasted(rng, images, alpha))


def mixup_or_cutmix(
    mix_rng: Array, cut_rng: Array, images: Array, labels: Array, mix_alpha: float, cut_alpha: float
) -> Examples:
    """Each example gets one of the two, by the toss of a coin, with the draw that it has alone."""
    # Folded far from the few keys that mixup splits off the same one.
    coin = jax.random.bernoulli(jax.random.fold_in(mix_rng, 1000), 0.5, (len(images), 1, 1, 1))
    averaged, pasted = _beta(mix_rng, images, mix_alpha), _pasted(cut_rng, images, cut_alpha)
    return _mix(images, labels, jnp.where(coin, averaged, pasted))


OPERATIONS = ("identity", "rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPERATIONS += ("brightness", "color", "contrast", "sharpness", "solarize", "posterize")
OPERATIONS += ("autocontrast", "equalize")
# In order of application.
AUGMENTATIONS: dict[str, Callable[..., Examples]] = {
    "flip_probability": flip,
    "rotate_degrees": rotate,
    "zoom_fraction": zoom,
    "crop_fraction": crop,
    "translate_pixels": translate,
    "brightness": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "rand_augment_magnitude": rand_augment,
    "erase_probability": erase,
    "cutout_pixels": cutout,
    "mixup_alpha": mixup,
    "cutmix_alpha": cutmix,
}
# What two that are both on become: (rng, rng, images, labels, strength, strength) -> the same.
PAIRS: dict[tuple[str, ...], Callable[..., Examples]] = {
    ("rotate_degrees", "zoom_fraction"): rotate_and_zoom,
    ("mixup_alpha", "cutmix_alpha"): mixup_or_cutmix,
}
# The largest strength that has a meaning, where there is one.
LIMITS = {
    "flip_probability": 1,
    "rotate_degrees": 180,
    "brightness": 1,
    "contrast": 1,
    "saturation": 1,
    "crop_fraction": 0.99,
    "rand_augment_magnitude": 10,
    "erase_probability": 1,
}


def compose(**values: float) -> Augment:
    """Returns one function `(rng, images, labels)` that applies what has a strength above 0.

    Args:
        values: by the names of `AUGMENTATIONS`, and of their functions' keyword arguments; what is
            left out is off, or at its default.

    The key of each is folded with its name, so that its draws do not change when others are
    switched on or off, or added to this file. Raises TypeError for an unknown name.
    """
    known = AUGMENTATIONS.keys() | set().union(*map(_own_keys, AUGMENTATIONS.values()))
    if unknown := values.keys() - known:
        raise TypeError(f"there is no augmentation {', '.join(sorted(unknown))}")
    on = [name for name in AUGMENTATIONS if values.get(name, 0) > 0]
    pairs: list[tuple[str, ...]] = [pair for pair in PAIRS if set(pair) <= set(on)]
    groups = pairs + [(name,) for name in on if not any(name in pair for pair in pairs)]
    groups.sort(key=lambda names: on.index(names[0]))

    def augment(rng: Array, images: Array, labels: Array) -> Examples:
        for names in groups:
            function = PAIRS.get(names) or AUGMENTATIONS[names[0]]
            rngs = [jax.random.fold_in(rng, zlib.crc32(name.encode())) for name in names]
            own = {key: values[key] for key in _own_keys(function) & values.keys()}
            images, labels = function(*rngs, images, labels, *[values[n] for n in names], **own)
        return images, labels

    return augment


def resized(augment: Augment, size: tuple[int, int]) -> Augment:
    """`augment`, then images of `size` (height, width), averaged where that is smaller."""

    def augment_and_resize(rng: Array, images: Array, labels: Array) -> Examples:
        images, labels = augment(rng, images, labels)
        batch, _, _, channels = images.shape
        return jax.image.resize(images, (batch, *size, channels), "linear"), labels

    return augment_and_resize


def _own_keys(function: Callable) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def _uniform(rng: Array, images: Array, bound: float) -> Array:
    """float32[B] in [-bound, bound]."""
    return jax.random.uniform(rng, (len(images),), jnp.float32, -bound, bound)


def _shift(rng: Array, images: Array, direction: Array, bound: float) -> Array:
    amount = _uniform(rng, images, bound)[:, None, None, None].astype(images.dtype)
    return jnp.clip(images + amount * direction, 0, 1)


def _boxes(rng: Array, images: Array, heights: Array, widths: Array) -> Array:
    """bool[B, H, W, 1]: boxes (sides int[B]) about uniform random pixels, cut off at the edges."""

    def span(rng: Array, lengths: Array, size: int) -> Array:
        starts = jax.random.randint(rng, lengths.shape, 0, size) - lengths // 2
        offsets = jnp.arange(size)[None] - starts[:, None]
        return (offsets >= 0) & (offsets < lengths[:, None])

    _, height, width, _ = images.shape
    rngs = jax.random.split(rng)
    rows, columns = span(rngs[0], heights, height), span(rngs[1], widths, width)
    return rows[:, :, None, None] & columns[:, None, :, None]


def _beta(rng: Array, images: Array, alpha: float) -> Array:
    """float32[B, 1, 1, 1]: weights of the partners, 0 where alpha is."""
    shape = (len(images), 1, 1, 1)
    return jax.random.beta(rng, alpha, alpha, shape, jnp.float32) if alpha else jnp.zeros(shape)


def _pasted(rng: Array, images: Array, alpha: float) -> Array:
    """float32[B, H, W, 1]: weights of the partners, 1 in a box and 0 outside."""
    share_rng, box_rng = jax.random.split(rng)
    side = jnp.sqrt(_beta(share_rng, images, alpha).reshape(-1))
    heights, widths = ((side * size).astype(jnp.int32) for size in images.shape[1:3])
    return _boxes(box_rng, images, heights, widths).astype(jnp.float32)


def _mix(images: Array, labels: Array, weights: Array) -> Examples:
    """Replaces the share `weights` (float32[B, H or 1, W or 1, 1]) of examples by their partners'.

    The partner is the example before: as random as any permutation of a shuffled batch, never the
    example itself, and on a sharded batch only one example per device has to travel.
    """

    def blend(values: Array, weights: Array) -> Array:
        return (1 - weights) * values + weights * jnp.roll(values, 1, axis=0)

    shares = weights.mean((1, 2, 3))[:, None]
    return blend(images, weights.astype(images.dtype)), blend(labels, shares)
