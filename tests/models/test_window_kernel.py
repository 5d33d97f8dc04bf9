"""The TPU kernels of window attention against plain attention, run without a TPU."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sss_jax.models import hiera, window_block_kernel, window_kernel, windows
from sss_jax.models.window_kernel import attend, group_of_windows


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def by_definition(projections, heads, windows):
    """Plain attention inside windows: rows of a group go line by line through all its windows."""
    if len(projections) == 1:
        q, k, v = jnp.split(projections[0], 3, -1)
    else:
        q, (k, v) = projections[0], jnp.split(projections[1], 2, -1)
    groups, queries, width = q.shape
    side = math.isqrt(queries // windows)

    def split(x):
        x = x.reshape(groups, -1, side, windows, side, heads, width // heads)
        return jnp.moveaxis(x, 3, 1).reshape(groups, windows, -1, heads, width // heads)

    q, k, v = split(q), split(k), split(v)
    logits = jnp.einsum("gwnhd,gwthd->gwhnt", q, k) * (width // heads) ** -0.5
    y = jnp.einsum("gwhnt,gwthd->gwnhd", jax.nn.softmax(logits), v)
    y = y.reshape(groups, windows, side, side, width)
    return jnp.moveaxis(y, 1, 2).reshape(groups, queries, width)


# Groups, windows of a group, queries and keys of a window, channels, heads: together or one by
# one, pooled or not, in whole tiles or not.
SHAPES = [
    (4, 1, 49, 49, 24, 3),
    (2, 8, 16, 16, 16, 2),
    (3, 2, 16, 64, 8, 1),
    (2, 8, 4, 16, 8, 2),
    (3, 1, 49, 196, 8, 2),
]


def example(shape):
    groups, windows, queries, keys, width, heads = shape
    queries, keys = queries * windows, keys * windows
    if queries == keys:
        return (normal(0, groups, queries, 3 * width),), heads, windows
    kv = normal(1, groups, keys, 2 * width)
    return (normal(0, groups, queries, width), kv), heads, windows


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_follow_the_definition(shape):
    projections, heads, windows = example(shape)
    found, gradient = jax.vjp(lambda x: attend(x, heads, windows, True), projections)
    expected, by_autodiff = jax.vjp(lambda x: by_definition(x, heads, windows), projections)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    bar = normal(2, *found.shape)
    for one, other in zip(gradient(bar)[0], by_autodiff(bar)[0], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_several_blocks_are_the_same_as_one(monkeypatch):
    arguments = example((8, 1, 16, 16, 8, 2))
    expected = attend(*arguments, True)
    monkeypatch.setattr(window_kernel, "BLOCK", 1)
    np.testing.assert_allclose(attend(*arguments, True), expected, rtol=1e-5, atol=1e-6)


def test_windows_side_by_side_are_grouped_where_their_tokens_fill_tiles():
    assert group_of_windows(32, 16, 16) == 8
    assert group_of_windows(32, 64, 64) == 2
    assert group_of_windows(32, 16, 64) == 2
    assert group_of_windows(32, 4, 16) == 8
    assert group_of_windows(5, 196, 196) == 1
    assert group_of_windows(3, 16, 16) == 3
    assert group_of_windows(3, 4, 16) == 1


def test_blocks_hold_whole_windows_whose_corners_can_come_first():
    """The map numbers its pixels; four rows of two windows of 4 x 4 make a block."""
    x = jnp.arange(2 * 8 * 16.0).reshape(2, 8, 16, 1)
    plain = windows.group(x, 4, 2, False)
    np.testing.assert_array_equal(plain[1, :, 0], x[0, :4, 8:].ravel())
    corners = windows.group(x, 4, 2, True)
    np.testing.assert_array_equal(
        corners[1].reshape(4, 8), [x[0, i:4:2, 8 + j :: 2].ravel() for i in (0, 1) for j in (0, 1)]
    )
    merged = windows.merge(plain.reshape(-1, 4, 8, 1), 8, 16)
    np.testing.assert_array_equal(merged, x)


@pytest.mark.parametrize(("side", "pool"), [(8, True), (10, True), (10, False)])
def test_a_block_is_the_same_on_tpus_as_elsewhere(monkeypatch, interpreted, side, pool):
    """Windows that fit and that overhang: padding before the projection, or after it.

    Blocks whose projections do not fit into one kernel with attention.
    """
    monkeypatch.setattr(window_block_kernel, "suits", lambda *size: False)
    plain = hiera.Block(8, 2, 4, pool, 2, jnp.float32)
    x = normal(0, 2, side, side + 4, 4 if pool else 8)
    params = jax.eval_shape(plain.init, jax.random.key(0), x)
    params = jax.tree.map(lambda x: normal(1, *x.shape), params)
    expected, by_autodiff = jax.vjp(jax.jit(plain.apply), params, x)
    found, gradient = jax.vjp(jax.jit(plain.clone(kernels="tpu").apply), params, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    weight = normal(3, *expected.shape)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3),
        gradient(weight),
        by_autodiff(weight),
    )
    assert "window_attention_backward" in interpreted
