"""Collectives: eight devices see what one device sees, and none at all without an axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sss_jax.parallel import axis_index, axis_size, pmean, psum, rows, swap_neighbours

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


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
@pytest.mark.parametrize("each", [1, 2, 3, 4])
def test_neighbours_change_places_on_any_number_of_devices(devices, each):
    count = devices * each
    tree = {"image": np.arange(3 * count, dtype=np.float32).reshape(count, 3)}
    tree["valid"] = np.arange(count) % 3 == 0
    partner = [min(i ^ 1, count - 1) for i in range(count)]
    whole = swap_neighbours(tree, None)
    parts = jax.pmap(
        lambda t: swap_neighbours(t, "data"), axis_name="data", devices=jax.devices()[:devices]
    )(jax.tree.map(lambda x: x.reshape(devices, each, *x.shape[1:]), tree))
    for name, x in tree.items():
        np.testing.assert_array_equal(whole[name], x[partner])
        np.testing.assert_array_equal(np.asarray(parts[name]).reshape(x.shape), x[partner])
        assert parts[name].dtype == x.dtype


@pytest.mark.parametrize(("each", "sent"), [(1, 1), (2, 0), (3, 1), (4, 0)])
def test_pairs_stay_on_a_device_where_they_can(each, sent):
    swap = jax.pmap(lambda x: swap_neighbours(x, "data"), axis_name="data")
    text = str(jax.make_jaxpr(swap)(jnp.zeros((DEVICES, each, 5))))
    assert text.count("ppermute") == sent
    assert sent == 0 or "f32[1,5] = ppermute" in text, "one row"


def test_gradients_go_to_the_neighbour():
    x, weight = jnp.arange(8.0), jnp.arange(8.0) ** 2

    def loss(x_B, weight_B):
        return psum(jnp.sum(swap_neighbours(x_B, "data") * weight_B), "data")

    gradient = jax.pmap(jax.grad(loss), axis_name="data")(shards(x), shards(weight))
    # n times the gradient: see the module's docstring.
    expected = weight[jnp.arange(8) ^ 1]
    np.testing.assert_allclose(np.asarray(gradient).ravel() / DEVICES, expected, rtol=1e-6)


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
