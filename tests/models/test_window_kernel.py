"""The TPU kernels of window attention against plain attention, run without a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sss_jax.models import hiera, window_kernel
from sss_jax.models.window_kernel import attend, group_of_windows


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def by_definition(q, kv, heads):
    windows, queries, width = q.shape
    q, k, v = (x.reshape(windows, -1, heads, width // heads) for x in (q, *jnp.split(kv, 2, -1)))
    logits = jnp.einsum("wnhd,wthd->whnt", q, k) * (width // heads) ** -0.5
    y = jnp.einsum("whnt,wthd->wnhd", jax.nn.softmax(logits), v)
    return y.reshape(windows, queries, width)


# Windows, queries, keys, channels, heads: grouped or not, pooled or not, padded tiles.
SHAPES = [(4, 49, 49, 24, 3), (16, 16, 16, 16, 2), (6, 16, 64, 8, 1), (3, 49, 196, 8, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_follow_the_definition(shape):
    windows, queries, keys, width, heads = shape
    q, kv = normal(0, windows, queries, width), normal(1, windows, keys, 2 * width)
    bar = normal(2, windows, queries, width)
    found, gradient = jax.vjp(lambda q, kv: attend(q, kv, heads, True), q, kv)
    expected, by_autodiff = jax.vjp(lambda q, kv: by_definition(q, kv, heads), q, kv)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(gradient(bar), by_autodiff(bar), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_several_blocks_are_the_same_as_one(monkeypatch):
    q, kv = normal(0, 8, 16, 8), normal(1, 8, 16, 16)
    expected = attend(q, kv, 2, True)
    monkeypatch.setattr(window_kernel, "BLOCK", 1)
    monkeypatch.setattr(window_kernel, "ROWS", 32)
    np.testing.assert_allclose(attend(q, kv, 2, True), expected, rtol=1e-5, atol=1e-6)


def test_windows_are_grouped_where_their_tokens_fill_tiles():
    assert group_of_windows(4096, 16, 16) == 8
    assert group_of_windows(1024, 64, 64) == 2
    assert group_of_windows(1024, 16, 64) == 2
    assert group_of_windows(25, 196, 196) == 1
    assert group_of_windows(3, 16, 16) == 3
    assert group_of_windows(5, 16, 64) == 1


@pytest.mark.parametrize(("side", "pool"), [(8, True), (10, False)])
def test_a_block_is_the_same_on_tpus_as_elsewhere(monkeypatch, side, pool):
    """Windows that fit and that overhang: padding before the projection, or after it."""
    run_here = lambda q, kv, heads, interpret=True: attend(q, kv, heads, interpret)  # noqa: E731
    monkeypatch.setattr(window_kernel, "attend", run_here)
    x, kernel, bias = normal(0, 2, side, side, 6), normal(1, 6, 24), normal(2, 24)

    def run(attend, x, kernel, bias):
        return attend(x, kernel, bias, window=4, heads=2, pool=pool)

    elsewhere = functools.partial(hiera._attend, kernels=False)
    weight = normal(3, *run(elsewhere, x, kernel, bias).shape)
    gradients = [
        jax.value_and_grad(lambda *a, f=f: jnp.sum(weight * run(f, *a)), argnums=(0, 1, 2))
        for f in (hiera._attend_in_kernel, elsewhere)
    ]
    (found, found_bars), (expected, bars) = (g(x, kernel, bias) for g in gradients)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for one, other in zip(found_bars, bars, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
