"""Maps as phases: the same numbers as interpolation and strided convolutions of whole maps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sss_jax.models import convolution, phases
from sss_jax.models.sam2 import Sam2
from tests.small_networks import TRACKING_CONFIG, random_params


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_phases_of_a_map():
    x = normal(0, 2, 8, 12)
    found = phases.split(x, 4)
    assert found.shape == (2, 4, 4, 2, 3)
    np.testing.assert_array_equal(found[:, 1, 2], x[:, 1::4, 2::4])
    np.testing.assert_array_equal(phases.join(found), x)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_upsampling_is_bilinear(count, factor):
    x = normal(0, 2, 4 * count, 6 * count)
    found = phases.join(phases.upsample(phases.split(x, count), factor))
    down, across = (bilinear(side, factor) for side in x.shape[1:])
    np.testing.assert_allclose(found, np.einsum("ij,njk,lk->nil", down, x, across), atol=1e-6)


def bilinear(side, factor):
    """Weight of each pixel in each of `factor` times as many, half-pixel centres."""
    place = (np.arange(side * factor) + 0.5) / factor - 0.5
    return np.maximum(0, 1 - np.abs(place.clip(0, side - 1)[:, None] - np.arange(side)))


@pytest.mark.parametrize("count", [2, 4])
def test_convolving_phases_is_a_convolution_with_stride_two(count):
    x, kernel = normal(0, 2, 4 * count, 6 * count, 3), normal(1, 3, 3, 3, 5)
    split = jax.vmap(lambda plane: phases.split(plane, count), -1, 3)
    join = jax.vmap(phases.join, 3, -1)

    def in_phases(x, kernel):
        return join(phases.convolve_halving(split(x), kernel))

    def in_maps(x, kernel):
        return convolution.convolve(x, kernel, 2, 1)

    expected, by_definition = jax.vjp(in_maps, x, kernel)
    found, gradient = jax.vjp(in_phases, x, kernel)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    bar = normal(2, *expected.shape)
    for one, other in zip(gradient(bar), by_definition(bar), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_memories_are_the_same_on_tpus_as_elsewhere(interpreted):
    """One object's mask is remembered as it is, the other's thresholded."""
    elsewhere = Sam2(TRACKING_CONFIG)
    on_tpus = elsewhere.clone(config=dataclasses.replace(TRACKING_CONFIG, kernels="tpu"))
    params = random_params(elsewhere, 3)
    coarse, logits = normal(0, 1, 4, 6, 16), 3 * normal(1, 1, 2, 16, 24)
    score, binary = jnp.array([[1.0, -1.0]]), jnp.array([[False, True]])

    def memory(model):
        def encode(params, logits):
            variables, method = {"params": params}, "encode_memory"
            return model.apply(variables, coarse, logits, score, binary=binary, method=method)

        return jax.vjp(jax.jit(encode), params, logits)

    (expected, by_maps), (found, by_phases) = memory(elsewhere), memory(on_tpus)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    bar = normal(2, *expected.shape)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)  # noqa: E731
    jax.tree.map(close, by_phases(bar), by_maps(bar))
    assert np.abs(by_maps(bar)[1][0, 0]).max() > 1e-3
