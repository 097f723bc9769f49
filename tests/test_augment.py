import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image, ImageEnhance, ImageOps
from scipy.ndimage import map_coordinates

from imgcls import augment
from imgcls.augment import AUGMENTATIONS, compose, resized

STRENGTHS = {
    "flip_probability": 0.25,
    "rotate_degrees": 30.0,
    "zoom_fraction": 0.5,
    "crop_fraction": 0.75,
    "translate_pixels": 1,
    "brightness": 0.4,
    "contrast": 0.9,
    "saturation": 0.9,
    "rand_augment_magnitude": 9.0,
    "erase_probability": 0.5,
    "cutout_pixels": 4,
    "mixup_alpha": 1.0,
    "cutmix_alpha": 1.0,
}
MIXING = ["mixup_alpha", "cutmix_alpha"]
SIMPLE = [name for name in STRENGTHS if name not in MIXING]
KEY = jax.random.key(7)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def examples(height=8, width=6, low=0.0, high=1.0):
    """64 random images, and one-hot labels in which neighbours always differ."""
    images = np.random.default_rng(0).uniform(low, high, (64, height, width, 3))
    return jnp.asarray(images, jnp.float32), jnp.asarray(np.eye(4)[np.arange(64) % 4], jnp.float32)


@partial(jax.jit, static_argnames="on")
def run_simple(rng, images, labels, on=True):
    """The results of all but the mixing ones, by name: one program is quicker to compile."""
    strengths = STRENGTHS if on else dict.fromkeys(STRENGTHS, 0)
    return {name: AUGMENTATIONS[name](rng, images, labels, strengths[name]) for name in SIMPLE}


def run(name, images, labels, rng=KEY):
    """(images, labels) in numpy, augmented by one function at its strength above."""
    if name in MIXING:
        result = AUGMENTATIONS[name](rng, images, labels, STRENGTHS[name])
    else:
        result = run_simple(rng, images, labels)[name]
    return jax.tree.map(np.asarray, result)


def columns_shown(images, down=0, right=0):
    """Which column, from the centre, shows `down` and `right` of it, where values are columns."""
    return np.asarray(images[:, 10 + down, 10 + right, 0], np.float64) * 20 - 10


def share_moved(labels):
    """The share that each label, one-hot before, has lost to its neighbour's."""
    return 1 - labels[np.arange(64), np.arange(64) % 4]


def test_every_augmentation_is_tested():
    assert list(STRENGTHS) == list(AUGMENTATIONS)


@pytest.mark.parametrize("name", STRENGTHS)
def test_zero_strength_is_the_identity(name):
    images, labels = examples()
    if name in MIXING:
        augmented, targets = AUGMENTATIONS[name](KEY, images, labels, 0)
    else:
        augmented, targets = run_simple(KEY, images, labels, on=False)[name]
    np.testing.assert_array_equal(augmented, images)
    np.testing.assert_array_equal(targets, labels)


@pytest.mark.parametrize("name", STRENGTHS)
def test_shape_dtype_and_range_are_kept(name):
    images, labels = examples()
    for dtype in (jnp.float32, jnp.bfloat16):
        augmented, targets = run(name, images.astype(dtype), labels)
        assert augmented.shape == images.shape and augmented.dtype == dtype
        assert targets.shape == labels.shape and targets.dtype == jnp.float32
        assert (augmented >= 0).all() and (augmented <= 1).all()
        np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("name", STRENGTHS)
def test_draws_repeat_with_the_key_and_differ_between_keys_and_examples(name):
    images, labels = examples()
    alike = np.broadcast_to(images[:1], images.shape).copy()
    if name in MIXING:
        alike[1::2] = 0  # as neighbours that are alike would not show it
    alike = jnp.asarray(alike)
    first, again, other = (
        run(name, alike, labels, rng)[0] for rng in (KEY, KEY, jax.random.key(8))
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert len(np.unique(first[::2].reshape(32, -1), axis=0)) > 1


def test_flip_mirrors_some_and_twice_is_the_identity():
    images, labels = examples()
    once, _ = run("flip_probability", images, labels)
    mirrored = (once == images[:, :, ::-1]).all((1, 2, 3))
    assert (mirrored ^ (once == images).all((1, 2, 3))).all()
    assert 6 <= mirrored.sum() <= 26
    twice, _ = run("flip_probability", jnp.asarray(once), labels)
    np.testing.assert_array_equal(twice, images)


@pytest.mark.parametrize("size", [1, 8, 9])
def test_quarter_turns_are_exact(size):
    images = examples(size, size)[0][:5]
    turns = np.arange(-1, 4)
    radians = jnp.asarray(turns * np.pi / 2, jnp.float32)
    turned = jax.jit(augment.resample)(images, radians, jnp.ones(5))
    for image, n, got in zip(images, turns, turned, strict=True):
        np.testing.assert_array_equal(got, np.rot90(image, n))


def test_rotation_and_zoom_draw_from_their_whole_range_and_act_together():
    images = np.broadcast_to(np.linspace(0, 1, 21)[:, None], (400, 21, 21, 1))
    both = {"zoom_fraction": 0.5, "rotate_degrees": 30}
    augments = [compose(rotate_degrees=30), compose(zoom_fraction=0.5), compose(**both)]
    rotated, zoomed, turned = jax.jit(
        lambda images, labels: [augment(KEY, images, labels)[0] for augment in augments]
    )(jnp.asarray(images, jnp.float32), jnp.zeros((400, 2)))

    sines, scales = -columns_shown(rotated, down=4) / 4, 4 / columns_shown(zoomed, right=4)
    for draws, bound in (np.degrees(np.arcsin(sines)), 30), (np.log(scales), np.log(1.5)):
        assert -bound - 1e-3 < draws.min() < -0.95 * bound
        assert 0.95 * bound < draws.max() < bound + 1e-3
        assert abs(draws.mean()) < 0.15 * bound
    np.testing.assert_allclose(columns_shown(turned, down=4), -4 * sines / scales, atol=1e-3)


def test_zoom_shows_the_middle_larger_and_reflects_around_it():
    images = jnp.asarray(np.broadcast_to(np.arange(9.0)[:, None], (2, 9, 9, 1)), jnp.float32)
    larger, smaller = jax.jit(augment.resample)(images, jnp.zeros(2), jnp.array([2.0, 0.5]))
    np.testing.assert_allclose(larger[0, :, 0], 4 + np.arange(-4, 5) / 2)
    np.testing.assert_allclose(smaller[0, :, 0], [4, 2, 0, 2, 4, 6, 8, 6, 4])


@pytest.mark.parametrize(("pixels", "height", "width"), [(1, 8, 6), (5, 1, 4)])
def test_translation_is_a_crop_of_the_reflected_image(pixels, height, width):
    images, labels = examples(height, width)
    moved, _ = jax.jit(augment.translate, static_argnums=3)(KEY, images, labels, pixels)
    padded = np.pad(images, [(0, 0), (pixels, pixels), (pixels, pixels), (0, 0)], "reflect")
    shifts = range(2 * pixels + 1)
    is_crop = np.array(
        [
            [(padded[:, y : y + height, x : x + width] == moved).all((1, 2, 3)) for x in shifts]
            for y in shifts
        ]
    )
    assert is_crop.any((0, 1)).all()
    assert is_crop.any((0, 2)).all() and is_crop.any((1, 2)).all(), "some shifts are never drawn"


def test_a_crop_is_a_rectangle_of_the_image_enlarged():
    height, width, fraction = 40, 60, 0.75
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    ramps = np.stack(np.broadcast_arrays(y[:, None], x[None], 0.0), -1).astype(np.float32)
    images = jnp.asarray(np.broadcast_to(ramps, (512, *ramps.shape)))
    crop = jax.jit(augment.crop, static_argnums=3)
    got = np.asarray(crop(KEY, images, jnp.zeros((512, 1)), fraction)[0])
    # Inside, away from the half pixel at the edges that reflects, coordinates stay linear.
    tall = (got[:, -2, 2, 0] - got[:, 1, 2, 0]) * height / (height - 3)
    wide = (got[:, 2, -2, 1] - got[:, 2, 1, 1]) * width / (width - 3)
    area, ratio = tall * wide, wide / tall
    assert 1 - fraction - 0.02 < area.min() < 0.3 and 0.95 < area.max() < 1.02
    assert 3 / 4 - 0.05 < ratio.min() < 0.85 and 1.2 < ratio.max() < 4 / 3 + 0.05
    assert got[:, 0, :, 0].min() >= 0 and got[:, -1, :, 0].max() <= 1
    assert np.ptp(got[:, 1, 2, 0][area < 0.4]) > 0.3  # anywhere


operate = jax.jit(augment.operate)  # one program is quicker to compile than each operation
PILLOW = {
    "brightness": lambda image, level: ImageEnhance.Brightness(image).enhance(1 + 0.9 * level),
    "color": lambda image, level: ImageEnhance.Color(image).enhance(1 + 0.9 * level),
    "contrast": lambda image, level: ImageEnhance.Contrast(image).enhance(1 + 0.9 * level),
    "sharpness": lambda image, level: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * level),
    "solarize": lambda image, level: ImageOps.solarize(image, 255 * (1 - abs(level))),
    "posterize": lambda image, level: ImageOps.posterize(image, 8 - round(4 * abs(level))),
    "autocontrast": lambda image, level: ImageOps.autocontrast(image),
    "equalize": lambda image, level: ImageOps.equalize(image),
    "identity": lambda image, level: image,
}


@pytest.mark.parametrize("level", [-0.5, 1.0])
def test_operations_on_colours_are_pillows(level):
    pixels = np.random.default_rng(0).beta(2, 3, (102, 100, 3)) * [200, 255, 90] + [20, 0, 30]
    pixels = pixels.round().astype(np.uint8)
    which = jnp.array([augment.OPERATIONS.index(name) for name in PILLOW])
    images = jnp.asarray(np.broadcast_to(pixels / 255, (len(PILLOW), *pixels.shape)), jnp.float32)
    got = 255 * np.asarray(operate(images, which, jnp.full(len(PILLOW), level)))
    for name, result in zip(PILLOW, got):
        expected = np.asarray(PILLOW[name](Image.fromarray(pixels), level), np.float32)
        # Pillow rounds its gray, its blur and each result; equalising, it divides whole numbers.
        close = {"equalize": 7, "contrast": 2}.get(name, 1.6)
        assert np.abs(result - expected).max() <= close, name
        assert name == "identity" or np.abs(result - pixels).max() > 2


def test_a_gray_picture_stays_gray_and_a_flat_one_flat():
    color, autocontrast = (
        jnp.array([augment.OPERATIONS.index(n)]) for n in ("color", "autocontrast")
    )
    gray = examples()[0][:1, ..., :1]
    for images, which in ((gray, color), (0 * gray + 0.3, autocontrast)):
        np.testing.assert_allclose(operate(images, which, jnp.array([0.5])), images, atol=1e-6)


def test_operations_that_move_pixels_move_them_by_what_they_say():
    names = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
    size, middle = 21, 10
    y, x = (np.broadcast_to(a, (size, size)) for a in np.mgrid[:size, :size] / (size - 1))
    images = np.broadcast_to(np.stack([y, x, 0 * x], -1), (5, size, size, 3)).astype(np.float32)
    which = jnp.array([augment.OPERATIONS.index(name) for name in names])
    got = np.asarray(operate(jnp.asarray(images), which, jnp.full(5, 0.5)))
    down, right = ((got[..., i] - images[..., i]) * (size - 1) for i in (0, 1))
    # One pixel below and to the right of the centre.
    corner = (slice(None), middle + 1, middle + 1)
    turn = np.deg2rad(15)
    expected_down = [np.cos(turn) + np.sin(turn) - 1, 0, 0.15, 0, 0.225 * size]
    expected_right = [np.cos(turn) - np.sin(turn) - 1, 0.15, 0, 0.225 * size, 0]
    np.testing.assert_allclose(down[corner], expected_down, atol=1e-4)
    np.testing.assert_allclose(right[corner], expected_right, atol=1e-4)


def test_rand_augment_draws_every_operation_with_either_sign():
    images = jnp.full((2000, 3, 3, 3), 0.5)
    one = jax.jit(partial(augment.rand_augment, rand_augment_layers=1), static_argnums=3)
    got = one(KEY, images, jnp.zeros((2000, 1)), 5.0)[0]
    values, counts = np.unique(np.asarray(got)[:, 1, 1, 0].round(3), return_counts=True)
    # Of a flat gray, only brightness, solarizing and posterizing (128 to 0.502) change the value.
    shares = {round(float(value), 3): count / 2000 for value, count in zip(values, counts)}
    assert shares[0.275] == pytest.approx(1 / 28, abs=0.02)
    assert shares[0.725] == pytest.approx(1 / 28, abs=0.02)


def test_erasing_fills_a_rectangle_of_the_papers_area_with_noise():
    images = jnp.full((400, 40, 40, 3), -1.0)
    erase = jax.jit(augment.erase, static_argnums=3)
    got = np.asarray(erase(KEY, images, jnp.zeros((400, 1)), 0.5)[0])
    erased = (got >= 0).all(-1)
    touched = erased.any((1, 2))
    assert touched.mean() == pytest.approx(0.5, abs=0.1)
    for box in erased[touched]:
        rows, columns = box.any(1), box.any(0)
        assert box.sum() == rows.sum() * columns.sum()  # one rectangle
    assert 0.35 < erased.mean((1, 2)).max() <= 0.42
    assert np.std(got[erased]) == pytest.approx(1 / 12**0.5, abs=0.02)


def test_brightness_adds_one_number_to_an_image():
    images, labels = examples(low=0.4, high=0.6)
    added = run("brightness", images, labels)[0] - np.asarray(images)
    np.testing.assert_allclose(added.std((1, 2, 3)), 0, atol=1e-6)
    assert 0.3 < added.max() <= 0.4001 and -0.4001 <= added.min() < -0.3


def test_contrast_keeps_means_and_scales_deviations():
    images, labels = (np.asarray(x) for x in examples(low=0.4, high=0.6))
    changed, _ = run("contrast", images, labels)
    np.testing.assert_allclose(changed.mean((1, 2)), images.mean((1, 2)), atol=1e-6)
    ratios = changed.std((1, 2)) / images.std((1, 2))
    np.testing.assert_allclose(ratios, np.broadcast_to(ratios[:, :1], ratios.shape), rtol=1e-4)
    assert 0.0999 <= ratios.min() < 0.3 and 1.7 < ratios.max() < 1.9001


def test_saturation_keeps_luma_and_leaves_gray_alone():
    images, labels = (np.asarray(x) for x in examples(low=0.4, high=0.6))
    changed, _ = run("saturation", images, labels)
    luma = np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(changed @ luma, images @ luma, atol=1e-6)
    ratios = np.ptp(changed, axis=-1) / np.ptp(images, axis=-1)
    np.testing.assert_allclose(ratios, np.broadcast_to(ratios[:, :1, :1], ratios.shape), rtol=1e-2)
    assert 0.099 <= ratios.min() < 0.3 and 1.7 < ratios.max() < 1.91

    gray = images[..., :1].repeat(3, axis=-1)
    np.testing.assert_allclose(run("saturation", gray, labels)[0], gray, atol=1e-6)
    one_channel, _ = augment.saturation(KEY, images[..., :1], labels, 0.9)
    np.testing.assert_array_equal(one_channel, images[..., :1])


def test_cutout_fills_one_square_with_the_mean():
    images, labels = (np.asarray(x) for x in examples())
    cut, _ = run("cutout_pixels", images, labels)
    blank = (cut != images).any(-1)
    rows, columns = blank.any(2), blank.any(1)
    np.testing.assert_array_equal(blank, rows[:, :, None] & columns[:, None, :])
    for sides in (rows.sum(1), columns.sum(1)):
        assert set(sides) == {2, 3, 4}, "4, or less where it is cut off at the edge"
    assert rows[rows.sum(1) == 2][:, 0].all(), "2 rows only where the middle is the first"
    assert rows.any(0).all() and columns.any(0).all(), "some pixels are never blanked"
    one, _ = augment.cutout(KEY, images[:, :6], labels, 1)
    _, row, column = np.nonzero((np.asarray(one) != images[:, :6]).any(-1))
    assert len(row) == 64 and (row != column).any()
    means = np.broadcast_to(images.mean((1, 2), keepdims=True), cut.shape)
    np.testing.assert_allclose(cut[blank], means[blank], atol=1e-6)


def test_mixup_averages_images_as_labels():
    images, labels = (np.asarray(x) for x in examples())
    mixed, targets = run("mixup_alpha", images, labels)
    share = share_moved(targets)[:, None]
    expected = (1 - share) * labels + share * np.roll(labels, 1, axis=0)
    np.testing.assert_allclose(targets, expected, atol=1e-6)
    share = share[:, None, None]
    expected = (1 - share) * images + share * np.roll(images, 1, axis=0)
    np.testing.assert_allclose(mixed, expected, atol=1e-6)
    assert share.min() < 0.1 and share.max() > 0.9


def test_cutmix_labels_match_the_share_of_pixels():
    images, labels = (np.asarray(x) for x in examples())
    mixed, targets = run("cutmix_alpha", images, labels)
    pasted = (mixed == np.roll(images, 1, axis=0)).all(-1)
    assert (pasted ^ (mixed == images).all(-1)).all()
    boxes = pasted.any(2)[:, :, None] & pasted.any(1)[:, None, :]
    np.testing.assert_array_equal(pasted, boxes)
    share = pasted.mean((1, 2))[:, None]
    expected = (1 - share) * labels + share * np.roll(labels, 1, axis=0)
    np.testing.assert_allclose(targets, expected, atol=1e-6)
    assert share.min() < 0.1 and share.max() > 0.6


def test_mixup_and_cutmix_together_give_each_example_one_of_them():
    images, labels = examples()
    averaged, pasted, either = (
        compose(**{name: 1.0 for name in names})(KEY, images, labels)
        for names in (MIXING[:1], MIXING[1:], MIXING)
    )

    def same(one, other):
        gaps = [np.abs(np.subtract(a, b)).reshape(64, -1).max(1) for a, b in zip(one, other)]
        return np.maximum(*gaps) < 1e-6

    assert (same(either, averaged) | same(either, pasted)).all()
    assert 16 <= same(either, averaged).sum() <= 48


def test_compose_applies_in_the_order_of_the_registry_each_with_its_own_key():
    names = ["flip_probability", "translate_pixels", "contrast", "cutout_pixels"]
    composed = compose(saturation=0, **{name: STRENGTHS[name] for name in reversed(names)})

    def by_hand(rng, *examples):
        for name in names:
            rng_of_name = jax.random.fold_in(rng, zlib.crc32(name.encode()))
            examples = AUGMENTATIONS[name](rng_of_name, *examples, STRENGTHS[name])
        return examples

    assert names == [name for name in AUGMENTATIONS if name in names]
    got, want = jax.jit(lambda *args: (composed(*args), by_hand(*args)))(KEY, *examples())
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_new_augmentation_changes_no_other_s_draws(monkeypatch):
    strengths = {name: STRENGTHS[name] for name in ("rotate_degrees", "brightness", "mixup_alpha")}
    before = compose(**strengths)(KEY, *examples())
    new = {"invert_probability": lambda rng, images, labels, probability: (images, labels)}
    monkeypatch.setattr(augment, "AUGMENTATIONS", new | AUGMENTATIONS)
    after = compose(**strengths, invert_probability=1.0)(KEY, *examples())
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_an_augmentation_takes_keyword_arguments_of_its_own(monkeypatch):
    def erase(rng, images, labels, probability, *, erase_value=0.5):
        return jnp.full_like(images, erase_value), labels

    monkeypatch.setitem(AUGMENTATIONS, "erase_probability", erase)
    for own in ({}, {"erase_value": 0.25}):
        images, _ = compose(erase_probability=1.0, **own)(KEY, *examples())
        assert (images == own.get("erase_value", 0.5)).all()
    with pytest.raises(TypeError, match="no augmentation erase_vale"):
        compose(erase_probability=1.0, erase_vale=1.0)


def test_any_turn_and_scale_is_interpolated_as_by_scipy():
    images = np.random.default_rng(0).random((2, 9, 7, 1)).astype(np.float32)
    radians, scales = np.array([0.4, -1.1]), np.array([1.3, 0.7])
    found = augment.resample(images, jnp.float32(radians), jnp.float32(scales))
    for image, turn, scale, ours in zip(images[..., 0], radians, scales, found[..., 0]):
        y, x = np.mgrid[:9, :7] - np.array([4, 3])[:, None, None]
        cos, sin = np.cos(turn) / scale, np.sin(turn) / scale
        where = [cos * y + sin * x + 4, cos * x - sin * y + 3]
        theirs = map_coordinates(image, where, order=1, mode="mirror")
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_nothing_on_is_the_identity():
    images, labels = examples()
    for composed in compose(), compose(**dict.fromkeys(AUGMENTATIONS, 0)):
        assert composed(KEY, images, labels) == (images, labels)


@pytest.mark.parametrize("mixing", [False, True])
def test_one_device_equals_many_and_only_mixing_communicates(mixing):
    if mixing:
        function = jax.jit(lambda *args: {"cutmix_alpha": augment.cutmix(*args, 1.0)})
    else:
        function = run_simple
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    split = jax.device_put(examples(), NamedSharding(mesh, PartitionSpec("data")))
    compiled = function.lower(KEY, *split).compile()
    assert ("collective-permute(" in compiled.as_text()) == (mixing and jax.device_count() > 1)
    assert "all-gather(" not in compiled.as_text()
    for name, many in compiled(KEY, *split).items():
        one = run(name, *examples())
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), many, one)


def test_pmap_equals_each_device_alone():
    n = jax.device_count()
    images, labels = (np.stack([x] * n) for x in examples())
    rngs = jax.random.split(KEY, n)
    translate = partial(augment.translate, pixels=1)
    mapped, _ = jax.pmap(translate)(rngs, images, labels)
    for i in range(n):
        alone, _ = run("translate_pixels", *examples(), rngs[i])
        np.testing.assert_array_equal(mapped[i], alone)


def test_resized_images_are_averages_of_what_they_show():
    images, labels = examples(height=8, width=6)
    keep = lambda rng, images, labels: (images, labels)
    same, _ = resized(keep, (8, 6))(KEY, images, labels)
    np.testing.assert_allclose(same, images, atol=1e-6)
    smaller, unchanged = resized(keep, (4, 3))(KEY, images, labels)
    assert smaller.shape == (64, 4, 3, 3)
    np.testing.assert_array_equal(unchanged, labels)
    flat, _ = resized(keep, (5, 5))(KEY, jnp.full_like(images, 0.3), labels)
    np.testing.assert_allclose(flat, 0.3, atol=1e-6)
