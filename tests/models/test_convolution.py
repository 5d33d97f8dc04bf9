"""Convolutions: their forms for CPUs against XLA's own, values and gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sss_jax.models import convolution


def values(form, weight, *args):
    """Return what a form gives, and the gradients of a weighted sum of it."""
    return form(*args), jax.grad(lambda *a: jnp.sum(weight * form(*a)), (0, 1))(*args)


def assert_same(own, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), own, other)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
    ("side", "stride", "padding", "shape"),
    [
        (3, 1, 1, (2, 5, 7, 3)),
        (3, 2, 1, (2, 8, 6, 3)),
        (3, 2, 1, (1, 9, 6, 2)),  # the last row is in no window
        (7, 4, 3, (2, 16, 12, 3)),
        (2, 2, 0, (1, 6, 4, 3)),
        (4, 4, 0, (1, 11, 8, 1)),
    ],
)
def test_gradients_written_out_are_those_of_the_convolution(side, stride, padding, shape):
    x, kernel = normal(0, *shape), normal(1, side, side, shape[-1], 5)
    expected = convolution._convolve(x, kernel, stride, padding)
    weight = normal(2, *expected.shape)
    own = values(lambda x, k: convolution.convolve(x, k, stride, padding), weight, x, kernel)
    other = values(lambda x, k: convolution._convolve(x, k, stride, padding), weight, x, kernel)
    np.testing.assert_array_equal(own[0], expected)
    assert_same(own, other)


def layouts(form):
    """Dimension labels of the convolutions in a loop's gradient, compiled for a CPU."""
    x, kernel = jnp.ones((3, 2, 8, 8, 4)), jnp.ones((3, 3, 4, 8))

    def loss(kernel, x):
        return jax.lax.scan(lambda total, x: (total + form(x, kernel).sum(), None), 0.0, x)[0]

    text = jax.jit(jax.grad(loss, (0, 1))).lower(kernel, x).compile().as_text()
    return set(re.findall(r"convolution\(.*dim_labels=(\S+?),", text))


def test_convolutions_in_loops_have_the_layout_of_fast_kernels():
    fast = {"b01f_01io->b01f"}
    assert layouts(lambda x, kernel: convolution.convolve(x, kernel, 2, 1)) == fast
    assert layouts(lambda x, kernel: convolution._convolve(x, kernel, 2, 1)) - fast


@pytest.mark.parametrize(
    ("side", "shape"), [(7, (2, 9, 5, 3)), (3, (1, 2, 6, 4)), (1, (1, 3, 3, 2))]
)
def test_depthwise_forms_agree_and_so_do_their_gradients(side, shape):
    """The form for CPUs, its derivative written out, against XLA's grouped convolution."""
    x, kernel, weight = normal(0, *shape), normal(1, side, side, 1, shape[-1]), normal(2, *shape)
    own = values(convolution._shift_and_add, weight, x, kernel)
    assert_same(own, values(convolution._grouped, weight, x, kernel))
    np.testing.assert_allclose(convolution.depthwise(x, kernel), own[0], atol=1e-5)
