"""Windows: cut and put back, and maps whose padding is not computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sss_jax import flops
from sss_jax.models import windows


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("height", "width", "window"), [(6, 9, 3), (5, 7, 4), (1, 1, 5), (8, 3, 1), (4, 4, 4)]
)
def test_windows_round_trip(height, width, window):
    x = normal(0, 2, height, width, 3)
    cut = windows.partition(windows.pad(x, window), window, window)
    count = -(-height // window) * -(-width // window)
    assert cut.shape == (2 * count, window, window, 3)
    np.testing.assert_array_equal(windows.merge(cut, height, width), x)


def test_windows_are_contiguous_squares():
    x = normal(0, 2, 6, 9, 1)
    cut = windows.partition(x, 3, 3)
    for index, (b, row, col) in enumerate(np.ndindex(2, 2, 3)):
        square = x[b, 3 * row : 3 * row + 3, 3 * col : 3 * col + 3]
        np.testing.assert_array_equal(cut[index], square)


def test_padding_is_zero_and_below_right():
    padded = windows.pad(jnp.ones((1, 5, 8, 1)), 4)
    assert padded.shape == (1, 8, 8, 1)
    np.testing.assert_array_equal(padded[0, :5], 1)
    np.testing.assert_array_equal(padded[0, 5:], 0)


@pytest.mark.parametrize("pool", [False, True])
def test_a_map_that_is_cut_attends_as_one_that_is_padded(monkeypatch, pool):
    """Values and gradients; a 16 x 18 map and windows of 14 leave strips of 2 and 4."""
    qkv, bias = normal(0, 2, 16, 18, 24), normal(1, 24)

    def both(waste):
        monkeypatch.setattr(windows, "WASTE", waste)
        y, gradient = jax.vjp(lambda *a: windows.attend(*a, 14, 2, pool), qkv, bias)
        return y, *gradient(jnp.sin(jnp.arange(y.size)).reshape(y.shape))

    for cut, padded in zip(both(1.0), both(1e9), strict=True):
        np.testing.assert_allclose(cut, padded, atol=1e-5 * np.abs(padded).max())


def test_a_small_map_costs_what_its_own_tokens_cost():
    """Windows of 14 pad a 16 x 16 map to 28 x 28: 4 x 196 queries of 196 keys."""
    qkv, bias = jnp.zeros((1, 16, 16, 48)), jnp.zeros(48)
    found = flops.count(lambda x, b: windows.attend(x, b, 14, 2, False), qkv, bias)
    pairs = 196 * 196 + 2 * 28 * 29 + 4 * 5
    assert found == 2 * 2 * pairs * 16
