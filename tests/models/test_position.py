"""Positional encodings."""

import jax
import numpy as np
import pytest

from sss_jax.models import position


@pytest.mark.parametrize(("n_in", "n_out"), [(7, 16), (7, 64), (14, 8), (14, 24), (7, 1), (1, 8)])
def test_bicubic_matches_pytorchs_convention(n_in, n_out):
    table = np.random.default_rng(0).standard_normal((n_in, 3)).astype(np.float32)
    expected = jax.image.resize(table, (n_out, 3), "cubic-pytorch", antialias=False)
    mine = position.bicubic_matrix(n_out, n_in) @ table
    np.testing.assert_allclose(mine, expected, atol=2e-6)


def test_bicubic_keeps_constants_and_identity():
    np.testing.assert_allclose(position.bicubic_matrix(10, 7).sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(position.bicubic_matrix(7, 7), np.eye(7))


def test_bicubic_overshoots_as_a_is_minus_three_quarters():
    # Half-way between two samples the taps are a/8, 1/2 - a/8, ...
    np.testing.assert_allclose(
        position.bicubic_matrix(4, 8)[1, 1:5], [-0.09375, 0.59375, 0.59375, -0.09375], atol=1e-6
    )


def test_trunk_position_adds_the_tiled_window():
    generator = np.random.default_rng(0)
    table = generator.standard_normal((1, 7, 7, 2)).astype(np.float32)
    window = generator.standard_normal((1, 4, 4, 2)).astype(np.float32)
    place = position.trunk_position(table, window, 8, 12)
    smooth = position.trunk_position(table, 0 * window, 8, 12)
    assert place.shape == (1, 8, 12, 2)
    for row, col in np.ndindex(2, 3):
        tile = (place - smooth)[0, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4]
        np.testing.assert_allclose(tile, window[0], atol=1e-5)


def test_fourier_features_of_points():
    gaussian = np.array([[1.0, 0.5], [0.0, 2.0]], np.float32)
    features = position.fourier_position(np.array([[0.75, 0.5]], np.float32), gaussian)
    angle = 2 * np.pi * np.array([0.5, 0.25])
    np.testing.assert_allclose(features[0], [*np.sin(angle), *np.cos(angle)], atol=1e-6)


def test_pixel_centres_are_xy():
    centres = position.pixel_centres(2, 4)
    assert centres.shape == (2, 4, 2)
    np.testing.assert_allclose(centres[1, 3], [0.875, 0.75])


def test_upsampling_repeats():
    x = np.random.default_rng(0).standard_normal((2, 3, 2, 5)).astype(np.float32)
    np.testing.assert_array_equal(position.upsample_2x(x), x.repeat(2, 1).repeat(2, 2))
