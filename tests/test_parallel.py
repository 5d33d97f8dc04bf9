"""Collectives: eight devices see what one device sees, and none at all without an axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sss_jax.parallel import axis_index, axis_size, pmean, psum, reverse_batch, rows

DEVICES = 8


def shards(x):
    return x.reshape(DEVICES, -1, *x.shape[1:])


@pytest.fixture(scope="module")
def tree():
    rng = np.random.default_rng(0)
    return {
        "image": rng.random((24, 2, 3), dtype=np.float32),
        "label": rng.integers(0, 5, (24, 3), dtype=np.int32),
        "valid": rng.random((24,)) < 0.5,
    }


def test_without_axis_nothing_changes(tree):
    assert psum(tree, None) is tree
    assert pmean(tree, None) is tree
    assert axis_size(None) == 1
    assert axis_index(None) == 0
    np.testing.assert_array_equal(rows(5, None), np.arange(5))


def test_reverse_batch_reverses_the_global_batch(tree):
    expected = {name: x[::-1] for name, x in tree.items()}
    whole = reverse_batch(tree, None)
    parts = jax.pmap(lambda t: reverse_batch(t, "data"), axis_name="data")(
        jax.tree.map(shards, tree)
    )
    for name, x in expected.items():
        np.testing.assert_array_equal(whole[name], x)
        np.testing.assert_array_equal(np.asarray(parts[name]).reshape(x.shape), x)
        assert parts[name].dtype == tree[name].dtype


def test_reverse_batch_passes_gradients_to_the_partner():
    x, weight = jnp.arange(8.0), jnp.arange(8.0) ** 2

    def loss(x_B, weight_B):
        return psum(jnp.sum(reverse_batch(x_B, "data") * weight_B), "data")

    gradient = jax.pmap(jax.grad(loss), axis_name="data")(shards(x), shards(weight))
    # n times the gradient: see the module's docstring.
    np.testing.assert_allclose(np.asarray(gradient).ravel() / DEVICES, weight[::-1], rtol=1e-6)


def test_collectives_over_eight_devices(tree):
    def local(image):
        total = psum(jnp.sum(image), "data")
        return total, pmean(jnp.sum(image), "data"), rows(image.shape[0], "data")

    total, mean, place = jax.pmap(local, axis_name="data")(shards(tree["image"]))
    np.testing.assert_allclose(total, np.full(DEVICES, tree["image"].sum()), rtol=1e-5)
    np.testing.assert_allclose(mean, np.full(DEVICES, tree["image"].sum() / DEVICES), rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(place).ravel(), np.arange(24))
    sizes = jax.pmap(lambda x: x * axis_size("data"), axis_name="data")(jnp.ones(DEVICES))
    np.testing.assert_array_equal(sizes, np.full(DEVICES, DEVICES))
