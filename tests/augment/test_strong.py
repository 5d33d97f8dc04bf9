"""Photometric changes and CutMix: values against references, and their distributions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from sss_jax.augment.keys import example_keys
from sss_jax.augment.strong import box_mask, cutmix_box, paste, photometric
from sss_jax.errors import ConfigError
from sss_jax.options import StrongOptions
from sss_jax.parallel import swap_neighbours

OFF = StrongOptions(jitter=0.0, blur=0.0, cutmix=0.0)


def options(**changes):
    return dataclasses.replace(OFF, **changes)


@functools.partial(jax.jit, static_argnums=2)
def _many(keys, image, settings_):
    return jax.vmap(lambda k: photometric(k, image, settings_))(keys)


def many(image, settings_, count, seed=0):
    return np.asarray(_many(jax.random.split(jax.random.key(seed), count), image, settings_))


one = jax.jit(photometric, static_argnums=2)


def noise(shape, seed=0, low=0.0, high=1.0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def test_nothing_applied_is_the_identity():
    image = noise((3, 6, 6, 1))
    np.testing.assert_array_equal(many(image, OFF, 4), np.broadcast_to(image, (4, *image.shape)))


def test_brightness_factors():
    image = np.full((1, 2, 2, 1), 0.5, np.float32)  # contrast leaves a constant as it is
    factor = many(image, options(jitter=0.8), 3000)[:, 0, 0, 0, 0] / 0.5
    changed = factor != 1
    assert abs(changed.mean() - 0.8) < 0.03
    assert 0.5 <= factor.min() < 0.51
    assert 1.49 < factor.max() <= 1.5
    assert abs(factor[changed].mean() - 1) < 0.02


def test_contrast_factors_keep_the_mean():
    image = np.array([0.4, 0.6, 0.45, 0.55], np.float32).reshape(1, 2, 2, 1)
    out = many(image, options(jitter=1.0, brightness=0.0), 2000).reshape(-1, 4)
    np.testing.assert_allclose(out.mean(1), np.full(2000, 0.5), atol=1e-6)
    factor = (out[:, 1] - out[:, 0]) / 0.2
    np.testing.assert_allclose((out[:, 3] - out[:, 2]) / 0.1, factor, atol=1e-5)
    assert 0.5 - 1e-5 <= factor.min() < 0.51
    assert 1.49 < factor.max() <= 1.5 + 1e-5


def test_both_orders_of_jitter_occur():
    # Only clipping tells them apart: without it both give b (c x + (1 - c) mean).
    white = np.array([0.0, 1.0], np.float32).reshape(1, 1, 2, 1)
    out = many(white, options(jitter=1.0), 4000, seed=1).reshape(-1, 2)
    # Brightness first with b > 1: clipped to {0, 1}, then c < 1 about 0.5 -> the pair sums to 1.
    first = np.isclose(out.sum(1), 1.0, atol=1e-6) & (out[:, 0] > 0.01)
    # Contrast first with c < 1, then b > 1: the pair sums to b unless clipped.
    second = (out.sum(1) > 1.001) & (out[:, 0] > 0.01)
    assert abs(first.mean() - 1 / 8) < 0.03
    assert abs(second.mean() - 1 / 8) < 0.03


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_scipy(sigma):
    image = noise((2, 9, 7, 1))
    out = many(image, options(blur=1.0, sigma_low=sigma, sigma_high=sigma), 1)[0, ..., 0]
    expected = ndimage.gaussian_filter(
        image[..., 0].astype(np.float64),
        sigma=(0, sigma, sigma),
        radius=(0, *[int(np.ceil(3 * sigma))] * 2),
        mode="nearest",
    )
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_blur_statistics():
    image = np.zeros((1, 33, 33, 1), np.float32)
    image[0, 16, 16] = 1.0
    out = many(image, options(blur=0.5), 600)[:, 0, :, :, 0]
    np.testing.assert_allclose(out.sum((1, 2)), np.ones(600), rtol=1e-5)
    offset = np.arange(33) - 16
    sigma = np.sqrt((out.sum(1) * offset**2).sum(1))
    blurred = out[:, 16, 16] < 1
    # Below sigma 0.25 the taps beside the centre are under 3e-4, still seen as blurred above 0.13.
    assert abs(blurred.mean() - 0.5) < 0.07
    assert sigma.max() <= 2.0
    assert sigma.max() > 1.9
    assert abs(np.median(sigma[blurred]) - 1.05) < 0.2


def test_result_stays_in_range_and_slices_share_the_draw():
    image = np.repeat(noise((1, 8, 8, 1)), 3, axis=0)
    out = many(image, StrongOptions(), 200)
    assert out.min() >= 0
    assert out.max() <= 1
    np.testing.assert_array_equal(out[:, 0], out[:, 2])
    assert not many(np.zeros_like(image), StrongOptions(), 200).any()


def test_padding_slices_stay_empty_and_change_nothing():
    image = noise((5, 6, 6, 1))
    padded = image.copy()
    padded[3:] = 0
    mask = np.arange(5) < 3
    for seed in range(8):
        key = jax.random.key(seed)
        out = one(key, padded, StrongOptions(), mask)
        expected = one(key, image[:3], StrongOptions())
        np.testing.assert_allclose(out[:3], expected, atol=1e-6)
        assert not np.asarray(out[3:]).any()
    empty = one(jax.random.key(0), padded, StrongOptions(), np.zeros(5, bool))
    assert not np.asarray(empty).any()


def test_colour_is_refused():
    with pytest.raises(ValueError, match="one channel, not 3"):
        photometric(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), StrongOptions())


@pytest.mark.parametrize("name", ["sigma", "area", "aspect"])
def test_crossed_ranges_are_refused(name):
    crossed = options(**{f"{name}_low": 0.4, f"{name}_high": 0.3})
    call = photometric if name == "sigma" else lambda key, _, o: cutmix_box(key, o)
    with pytest.raises(ConfigError, match=rf"strong\.{name}_low"):
        call(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), crossed)


@functools.cache
def boxes(settings_):
    keys = jax.random.split(jax.random.key(0), 6000)
    draw = jax.jit(jax.vmap(lambda k: cutmix_box(k, settings_)))
    return np.asarray(draw(keys), np.float64)


def test_box_statistics():
    drawn = boxes(StrongOptions())
    applied = drawn.any(1)
    assert abs(applied.mean() - 0.5) < 0.025
    assert drawn.min() >= 0
    assert drawn.max() <= 1 + 1e-6
    y0, x0, y1, x1 = drawn[applied].T
    height, width = y1 - y0, x1 - x0
    area, aspect = height * width, height / width
    assert 0.02 - 1e-5 <= area.min() < 0.025
    assert 0.39 < area.max() <= 0.4 + 1e-5
    assert abs(area.mean() - 0.21) < 0.01
    assert 0.3 - 1e-4 <= aspect.min() < 0.35
    assert 3.1 < aspect.max() <= 3.3 + 1e-3
    # Anywhere in the frame: the gap before the box is a uniform share of the free space.
    free = 1 - height
    assert abs((y0 / free)[free > 0.1].mean() - 0.5) < 0.03


@settings(max_examples=40, deadline=None)
@given(
    area=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    aspect=st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)).map(sorted),
    seed=st.integers(0, 2**31 - 1),
)
def test_boxes_of_any_allowed_options_fit(area, aspect, seed):
    wanted = options(
        cutmix=1.0,
        area_low=area[0],
        area_high=area[1],
        aspect_low=aspect[0],
        aspect_high=aspect[1],
    )
    y0, x0, y1, x1 = np.asarray(cutmix_box(jax.random.key(seed), wanted), np.float64)
    assert 0 <= y0 <= y1 <= 1 + 1e-6
    assert 0 <= x0 <= x1 <= 1 + 1e-6
    assert area[0] - 1e-5 <= (y1 - y0) * (x1 - x0) <= area[1] + 1e-5


def test_box_probability_ends():
    assert boxes(options(cutmix=1.0)).any(1).all()
    assert not boxes(OFF).any()
    whole = boxes(options(cutmix=1.0, area_low=1.0, area_high=1.0))
    np.testing.assert_allclose(whole, np.broadcast_to([0, 0, 1, 1], whole.shape), atol=1e-6)


def test_mask_follows_the_pixel_centre_rule():
    drawn = np.float32(boxes(options(cutmix=1.0))[:20])
    mask = np.asarray(box_mask(drawn, 5, 8))
    for i, (y0, x0, y1, x1) in enumerate(drawn):
        for r in range(5):
            for c in range(8):
                y, x = np.float32(r + 0.5) / np.float32(5), np.float32(c + 0.5) / np.float32(8)
                assert mask[i, r, c] == (y0 <= y < y1 and x0 <= x < x1)
    assert not np.asarray(box_mask(np.zeros((2, 4), np.float32), 5, 8)).any()
    assert np.asarray(box_mask(np.float32([[0, 0, 1, 1]]), 5, 8)).all()
    # Boxes that meet on a pixel's centre share no pixel and leave none out.
    meeting = np.asarray(box_mask(np.float32([[0, 0, 0.375, 1], [0.375, 0, 1, 1]]), 4, 4))
    np.testing.assert_array_equal(meeting[:, :, 0], [[1, 0, 0, 0], [0, 1, 1, 1]])


def test_masks_of_all_levels_agree():
    drawn = np.float32(boxes(options(cutmix=1.0))[:50])
    fine, coarse = np.asarray(box_mask(drawn, 48, 48)), np.asarray(box_mask(drawn, 16, 16))
    # At a factor of 3 a coarse pixel's centre is a fine pixel's centre.
    np.testing.assert_array_equal(coarse, fine[:, 1::3, 1::3])
    y0, x0, y1, x1 = drawn.T
    assert (np.abs(fine.mean((1, 2)) - (y1 - y0) * (x1 - x0)) < 0.05).all()


def test_paste_covers_every_layout():
    mask = np.asarray(box_mask(np.float32([[0, 0, 0.5, 0.5], [0, 0, 0, 0]]), 4, 4))
    for shape, axes in [
        ((2, 4, 4), None),
        ((2, 3, 4, 4), None),
        ((2, 3, 4, 4, 5), None),
        ((2, 4, 4, 5), "BHWC"),
        ((2, 4, 4, 4), "BHWC"),
    ]:
        a, b = noise(shape, 1), noise(shape, 2)
        out = np.asarray(paste(mask, a, b, axes))
        names = axes or {3: "BHW", 4: "BSHW", 5: "BSHWC"}[len(shape)]
        rows = np.moveaxis(out, [names.index("H"), names.index("W")], [1, 2])
        rows_a, rows_b = (
            np.moveaxis(x, [names.index("H"), names.index("W")], [1, 2]) for x in (a, b)
        )
        np.testing.assert_array_equal(rows[mask], rows_b[mask])
        np.testing.assert_array_equal(rows[~mask], rows_a[~mask])
    label = np.arange(32, dtype=np.int32).reshape(2, 4, 4)
    assert paste(mask, label, -label).dtype == jnp.int32


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((2, 4, 4, 5), None), ((2, 4, 4), "BHWC"), ((2, 8, 8), None), ((4, 4), "HW")],
)
def test_paste_refuses_what_does_not_match(shape, axes):
    with pytest.raises(ValueError, match=r"mask of shape|do not have axes"):
        paste(jnp.ones((2, 4, 4), bool), jnp.zeros(shape), jnp.zeros(shape), axes)


def test_strong_view_is_the_same_on_eight_devices():
    image = noise((8, 2, 8, 8, 1))
    ids = np.arange(40, 48, dtype=np.int32)
    root = jax.random.key(3)

    def strong(id_B, image_B, axis):
        keys = example_keys(root, id_B)
        changed = jax.vmap(lambda k, x: photometric(k, x, StrongOptions()))(keys, image_B)
        box = jax.vmap(lambda k: cutmix_box(k, options(cutmix=1.0)))(keys)
        return paste(box_mask(box, 8, 8), changed, swap_neighbours(changed, axis))

    whole = np.asarray(jax.jit(lambda i, x: strong(i, x, None))(ids, image))
    split = jax.pmap(lambda i, x: strong(i, x, "data"), axis_name="data")(
        ids[:, None], image[:, None]
    )
    np.testing.assert_allclose(np.asarray(split)[:, 0], whole, atol=1e-6)
    assert not np.array_equal(whole, image)
