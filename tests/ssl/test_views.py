"""Labelled views: which clips have their intensities changed, and that nothing else is."""

import dataclasses

import jax
import numpy as np

from sss_jax.options import ModelOptions, Options, StrongOptions
from sss_jax.ssl.views import labelled_view, unlabelled_views
from sss_jax.train.step import root_key

COUNT, SLICES, SIDE = 64, 3, 16


def options(share):
    return Options(
        model=ModelOptions(image_size=SIDE, num_classes=2),
        strong=StrongOptions(labelled=share, jitter=1.0),
    )


def clips(order=slice(None)):
    """Noise whose last slice is padding."""
    rng = np.random.default_rng(0)
    shape = (COUNT, SLICES, SIDE, SIDE)
    mask = np.broadcast_to(np.arange(SLICES) < SLICES - 1, shape[:2])
    real = mask[..., None, None]
    stream = {
        "id": np.arange(COUNT),
        "slice_mask": mask,
        "image": (rng.uniform(0.2, 0.8, shape) * real).astype(np.float32)[..., None],
        "label": (rng.integers(0, 3, shape) * real).astype(np.int32),
    }
    return {name: x[order] for name, x in stream.items()}


def view(share, order=slice(None)):
    made = jax.jit(lambda c: labelled_view(root_key(1), c, options(share)))(clips(order))
    return jax.tree.map(np.asarray, made)


def changed(share):
    """Which clips have other intensities than without the option."""
    images, plain = view(share).image_BSHWC, view(0.0).image_BSHWC
    return np.abs(images - plain).max(axis=(1, 2, 3, 4)) > 1e-4


def test_intensities_change_at_the_share_that_was_asked_for():
    assert changed(1.0).all()
    assert 0.3 < changed(0.5).mean() < 0.7


def test_without_it_strong_settings_do_not_matter():
    other = dataclasses.replace(options(0.0), strong=StrongOptions(brightness=0.1))
    made = jax.jit(lambda c: labelled_view(root_key(1), c, other))(clips())
    np.testing.assert_allclose(made.image_BSHWC, view(0.0).image_BSHWC, atol=1e-6)


def test_labels_and_padding_stay():
    plain, recoloured = view(0.0), view(1.0)
    np.testing.assert_array_equal(recoloured.label_BSHW, plain.label_BSHW)
    np.testing.assert_array_equal(recoloured.valid_BSHW, plain.valid_BSHW)
    assert not recoloured.image_BSHWC[:, -1].any()
    assert recoloured.image_BSHWC.min() >= 0
    assert recoloured.image_BSHWC.max() <= 1


def test_a_clip_draws_its_own_change_wherever_it_lies():
    order = np.random.default_rng(2).permutation(COUNT)
    moved, straight = view(0.5, order).image_BSHWC, view(0.5).image_BSHWC[order]
    np.testing.assert_allclose(moved, straight, atol=1e-6)


def test_slices_of_a_clip_change_alike():
    """Brightness alone: one factor for all pixels of all slices, another one for every clip."""
    strong = StrongOptions(labelled=1.0, jitter=1.0, contrast=0.0, brightness=0.2, blur=0.0)
    bright = dataclasses.replace(options(1.0), strong=strong)
    made = jax.jit(lambda c: labelled_view(root_key(1), c, bright))(clips()).image_BSHWC
    plain = view(0.0).image_BSHWC
    seen = (plain > 0.1) & (np.asarray(made) < 0.99)
    ratio = np.where(seen, made, np.nan) / np.where(seen, plain, 1)
    spread = np.nanmax(ratio, axis=(1, 2, 3, 4)) - np.nanmin(ratio, axis=(1, 2, 3, 4))
    assert spread.max() < 1e-5
    assert np.unique(np.nanmedian(ratio, axis=(1, 2, 3, 4)).round(4)).size > COUNT // 2


def test_unlabelled_views_do_not_see_it():
    made = [
        jax.jit(lambda c, s=s: unlabelled_views(root_key(1), c, options(s), None))(clips())
        for s in (0.0, 1.0)
    ]
    jax.tree.map(np.testing.assert_array_equal, *made)
