"""A trunk's block inside windows as TPU kernels against the plain one, run without a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sss_jax.models import hiera, window_block_kernel
from sss_jax.models.window_block_kernel import suits


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


# Height, width and side of the windows, pooled or not: grouped, one by one, overhanging below,
# beside, both; and of one image, whose last windows are another core's than its first.
MAPS = [
    (16, 32, 8, False),
    (8, 8, 8, False),
    (10, 16, 4, False),
    (16, 14, 4, False),
    (10, 11, 7, False),
    (14, 16, 4, False),
    (16, 32, 8, True),
    (8, 32, 4, True),
    (12, 28, 8, True),
]


@pytest.mark.parametrize("shape", MAPS)
@pytest.mark.parametrize("block", [1, 2**21])
def test_a_block_is_the_same_on_tpus_as_elsewhere(monkeypatch, interpreted, shape, block):
    """Groups come from main memory one by one, or all at once."""
    monkeypatch.setattr(window_block_kernel, "BLOCK", block)
    height, width, side, pool = shape
    plain = hiera.Block(16, 2, side, pool, 2, jnp.float32)
    x = normal(0, 1 if height == 14 else 2, height, width, 8 if pool else 16)
    params = jax.eval_shape(plain.init, jax.random.key(0), x)
    params = jax.tree.map(lambda x: normal(1, *x.shape) * 0.4, params)
    expected, by_plain = jax.vjp(jax.jit(plain.apply), params, x)
    found, by_kernels = jax.vjp(jax.jit(plain.clone(kernels="tpu").apply), params, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    bar = normal(3, *expected.shape)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-3)
    jax.tree.map(close, by_kernels(bar), by_plain(bar))
    assert "window_block_backward" in interpreted


def test_the_first_of_equals_takes_the_gradient_as_elsewhere(interpreted):
    """All queries and all of the shortcut are equal where their kernels are zero."""
    plain = hiera.Block(16, 2, 8, True, 2, jnp.float32)
    x = normal(0, 1, 16, 16, 8)
    params = jax.eval_shape(plain.init, jax.random.key(0), x)
    params = jax.tree.map(lambda x: normal(1, *x.shape) * 0.4, params)["params"]
    params["proj"]["kernel"] *= 0
    params["attn"]["qkv"]["kernel"] *= np.float32(np.arange(48) >= 16)[None]
    expected, by_plain = jax.vjp(jax.jit(plain.apply), {"params": params}, x)
    _, by_kernels = jax.vjp(jax.jit(plain.clone(kernels="tpu").apply), {"params": params}, x)
    bar = normal(3, *expected.shape)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-3)
    jax.tree.map(close, by_kernels(bar), by_plain(bar))
    assert "window_block_backward" in interpreted


def test_which_shapes_suit():
    assert suits(196, 768, False, jnp.bfloat16)
    assert not suits(196, 896, False, jnp.float32)  # parameters and gradients fill the core
    assert not suits(196, 1152, False, jnp.bfloat16)  # parameters and gradients fill the core
    assert suits(128, 384, True, jnp.bfloat16)
    assert not suits(196, 384, True, jnp.bfloat16)  # corners are no whole tiles
