"""Layer maths against definitions written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from sss_jax.models import layers


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_gelu_is_exact_with_its_derivative():
    x = np.linspace(-12, 12, 401)
    cdf = 0.5 * (1 + erf(x / np.sqrt(2)))
    np.testing.assert_allclose(layers.gelu(x.astype(np.float32)), x * cdf, atol=2e-6)
    slope = jax.vmap(jax.grad(layers.gelu))(x.astype(np.float32))
    expected = cdf + x * np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(slope, expected, atol=2e-6)


def test_max_pool():
    x = normal(0, 2, 4, 6, 3)
    cells = [x[:, i::2, j::2] for i in range(2) for j in range(2)]
    np.testing.assert_array_equal(layers.max_pool(x), np.max(cells, axis=0))


def test_of_equals_the_first_takes_the_gradient_of_a_maximum():
    x = np.float32([[[1, 3], [3, 3]], [[2, 2], [2, 2]], [[-1, 0], [5, 4]]]).reshape(3, 2, 1, 2)
    bar = np.float32([10, 20, 30]).reshape(3, 1)
    found, gradient = jax.vjp(lambda x: layers.max_over(x, (1, 3)), x)
    np.testing.assert_array_equal(found, [[3], [2], [5]])
    expected = np.float32([[[0, 10], [0, 0]], [[20, 0], [0, 0]], [[0, 0], [30, 0]]])
    np.testing.assert_array_equal(gradient(bar)[0], expected.reshape(x.shape))


def test_a_maximum_keeps_a_byte_for_each_result():
    x = jnp.ones((64, 4, 32), jnp.bfloat16)
    _, gradient = jax.vjp(lambda x: layers.max_over(x, (1,)), x)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(gradient)) <= 64 * 32


@pytest.mark.parametrize("cells", [False, True])
def test_transposed_convolution_writes_each_tap(cells):
    x, kernel, bias = normal(0, 2, 3, 2, 3, 4), normal(1, 2, 2, 4, 5), normal(2, 5)
    module = layers.ConvTranspose(5, jnp.float32, cells)
    y = module.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    assert y.shape == ((2, 3, 2, 3, 20) if cells else (2, 3, 4, 6, 5))
    y = layers.from_cells(y) if cells else y
    for i, j in np.ndindex(2, 2):
        np.testing.assert_allclose(y[..., i::2, j::2, :], x @ kernel[i, j] + bias, atol=1e-5)


def test_cells_hold_their_pixels_row_by_row():
    x = normal(0, 2, 4, 6, 3)
    cells = layers.to_cells(x)
    np.testing.assert_array_equal(cells[1, 1, 2], x[1, 2:4, 4:6].ravel())
    np.testing.assert_array_equal(layers.from_cells(cells), x)


@pytest.mark.parametrize(
    ("side", "stride", "padding"), [(7, 4, 3), (3, 1, 1), (2, 2, 0), (1, 1, 0)]
)
def test_convolution_pads_symmetrically(side, stride, padding):
    x = normal(0, 2, 8, 12, 3)
    module = layers.Conv(5, side, jnp.float32, stride, padding)
    params = {"kernel": normal(1, side, side, 3, 5), "bias": normal(2, 5)}
    y = module.apply({"params": params}, x)
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows, cols = ((n + 2 * padding - side) // stride + 1 for n in (8, 12))
    assert y.shape == (2, rows, cols, 5)
    for row, col in np.ndindex(rows, cols):
        patch = padded[:, stride * row : stride * row + side, stride * col : stride * col + side]
        expected = np.einsum("bijc,ijce->be", patch, params["kernel"]) + params["bias"]
        np.testing.assert_allclose(y[:, row, col], expected, atol=2e-5)


def test_layer_norm_survives_a_large_mean():
    x = normal(0, 4, 64) + 1e4
    norm = layers.LayerNorm(jnp.float32)
    params = {"scale": np.ones(64, np.float32), "bias": np.zeros(64, np.float32)}
    y = norm.apply({"params": params}, x)
    wide = x.astype(float)
    expected = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    np.testing.assert_allclose(y, expected, atol=5e-3)


def test_layer_norm_of_short_numbers_loses_less_than_their_rounding_did():
    x = normal(0, 64, 96).astype(np.float64) + 30
    rounded = jnp.asarray(x, jnp.bfloat16)
    ones = jnp.ones(96)
    y = layers.layer_norm(rounded, ones, 0 * ones, 1e-6)

    def exactly(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    of_rounded = exactly(np.asarray(rounded, np.float64))
    assert np.abs(y - of_rounded).max() < 0.01 * np.abs(of_rounded - exactly(x)).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm_learns_as_its_formula(dtype):
    x, weight = normal(0, 2, 3, 16), normal(1, 2, 3, 16)
    scale, bias = normal(2, 16), normal(3, 16)
    x = jnp.asarray(x + 3, dtype)

    def formula(x, scale, bias):
        x = x.astype(jnp.float32)
        x = x - x.mean(axis=-1, keepdims=True)
        return (
            x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-3) * scale[None, None]
            + bias[None, None]
        )

    def gradients(norm):
        return jax.grad(lambda *args: (weight * jnp.sin(norm(*args))).sum(), (0, 1, 2))(
            x, scale, bias
        )

    found = gradients(lambda *args: layers.layer_norm(*args, 1e-3))
    for ours, wanted in zip(found, gradients(formula), strict=True):
        assert ours.dtype == wanted.dtype
        np.testing.assert_allclose(ours, wanted, atol=2e-6 if dtype == jnp.float32 else 1e-2)


def test_what_norms_and_biases_keep_for_the_backward_pass():
    """What came in, once and in its own type, and two numbers for each row."""
    x = jnp.ones((64, 32), jnp.bfloat16)
    vector = jnp.ones(32)
    _, norm = jax.vjp(lambda x: layers.layer_norm(x, vector, vector, 1e-6), x)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(norm)) <= x.nbytes + 2 * 4 * 64 + 2 * 4 * 32
    _, bias = jax.vjp(layers.add_bias, x, vector.astype(x.dtype))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(bias)) <= 2 * 32


def test_dense_and_mlp():
    x = normal(0, 2, 3, 4)
    params = {
        f"layers_{i}": {"kernel": normal(i, 4, 4), "bias": normal(9 + i, 4)} for i in range(3)
    }
    mlp = layers.MLP((4, 4, 4), jax.nn.relu, jnp.float32)
    expected = x
    for i in range(3):
        expected = expected @ params[f"layers_{i}"]["kernel"] + params[f"layers_{i}"]["bias"]
        expected = np.maximum(expected, 0) if i < 2 else expected
    np.testing.assert_allclose(mlp.apply({"params": params}, x), expected, atol=1e-4)
