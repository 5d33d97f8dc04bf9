"""Cleaned and separated masks, against slow loops over scipy's components."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from sss_jax.models.masks import SMALL, SUPPRESSED, clean_masks, separate_objects

SHAPE = (2, 2, 7, 9)
AREAS = (1, 3, 8)


@functools.cache
def cleaner(area):
    return jax.jit(functools.partial(clean_masks, max_area=area))


def slow_clean(logits, area):
    """One mask at a time: holes, then islands of what came out."""
    out = logits.copy()
    for plane in out.reshape(-1, *out.shape[2:]):
        for outside, value in ((lambda x: x <= 0, SMALL), (lambda x: x > 0, -SMALL)):
            label, count = ndimage.label(outside(plane), np.ones((3, 3)))
            for component in range(1, count + 1):
                if (label == component).sum() <= area:
                    plane[label == component] = value
    return np.where((out > 0) == (logits > 0), logits, out)


def drawn(pattern, scale=3.0):
    """Logits of a mask that is drawn with # and dots."""
    rows = [[scale if c == "#" else -scale for c in line] for line in pattern.split()]
    return np.array(rows, np.float32)[None, None]


# Mostly on or mostly off, so that there are holes and islands of every size, and exact zeros.
noise = st.integers(0, 2**32 - 1).flatmap(
    lambda seed: st.floats(-2.0, 2.0).map(
        lambda shift: (
            np.round(2 * np.random.default_rng(seed).standard_normal(SHAPE) + 2 * shift) / 2
        ).astype(np.float32)
    )
)


@settings(max_examples=60, deadline=None)
@given(noise, st.sampled_from(AREAS))
def test_cleaning_is_the_slow_loop(logits, area):
    cleaned = np.asarray(cleaner(area)(logits))
    np.testing.assert_array_equal(cleaned, slow_clean(logits, area))


@settings(max_examples=30, deadline=None)
@given(noise, st.sampled_from(AREAS))
def test_nothing_is_left_to_clean(logits, area):
    once = cleaner(area)(logits)
    np.testing.assert_array_equal(cleaner(area)(once), once)


@pytest.mark.parametrize("value", [5.0, -5.0, 0.0])
def test_masks_of_one_side_stay(value):
    """All on, all off, and all exactly at the threshold, which counts as off."""
    logits = np.full((1, 1, 4, 5), value, np.float32)
    np.testing.assert_array_equal(cleaner(19)(logits), logits)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 1, 6), (2, 1, 6, 1)])
def test_thin_planes(shape):
    logits = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for area in AREAS:
        np.testing.assert_array_equal(cleaner(area)(logits), slow_clean(logits, area))


def test_zero_area_changes_nothing():
    logits = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    assert clean_masks(logits, 0) is logits


def test_corners_connect_and_an_island_counts_with_its_holes():
    corner = drawn("#..... .#.... ..#... ...... ......")
    np.testing.assert_array_equal(cleaner(2)(corner), corner)
    assert not (cleaner(3)(corner) > 0).any()
    ring = drawn("....... .###... .#.#... .###... .......")
    assert (cleaner(1)(ring) > 0).sum() == 9
    assert (cleaner(8)(ring) > 0).sum() == 9, "eight pixels and the hole are nine"
    assert (cleaner(9)(ring) > 0).sum() == 0


def test_masks_are_cleaned_one_by_one():
    """A hole at the end of a plane does not join one at the start of the next."""
    planes = np.ones((1, 2, 4, 4), np.float32)
    planes[0, 0, 3, 3] = planes[0, 1, 0, 0] = -1
    assert (cleaner(1)(planes) > 0).all()


# Objects.


def slow_separate(logits):
    out = logits.copy()
    for b, y, x in np.ndindex(len(out), *out.shape[2:]):
        column = logits[b, :, y, x].tolist()
        for k, own in enumerate(column):
            if own < max(column) or k > column.index(own):
                out[b, k, y, x] = min(own, SUPPRESSED)
    return out


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_separating_is_the_slow_loop(seed, objects):
    rng = np.random.default_rng(seed)
    # Rounded, so that there are ties; some below the bound already.
    logits = np.round(8 * rng.standard_normal((2, objects, 3, 4))).astype(np.float32)
    separate = np.asarray(separate_objects(jnp.asarray(logits)))
    np.testing.assert_array_equal(separate, slow_separate(logits))
    assert ((separate > 0).sum(axis=1) <= 1).all()
    np.testing.assert_array_equal(separate.max(axis=1), logits.max(axis=1))


def test_one_object_and_absent_objects_stay():
    alone = np.random.default_rng(0).standard_normal((1, 1, 3, 3)).astype(np.float32)
    np.testing.assert_array_equal(separate_objects(alone), alone)
    absent = np.full((1, 3, 3, 3), -1024.0, np.float32)
    np.testing.assert_array_equal(separate_objects(absent), absent)
