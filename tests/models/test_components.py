"""Labels inside jit against a depth-first search and scipy, for every kind of mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from scipy import ndimage

from sss_jax.models.components import component_sizes, label_components, plane_components

SHAPE = (5, 7, 9)


@functools.partial(jax.jit, static_argnums=1)
def label(mask, connectivity):
    return label_components(mask, connectivity)


def scipy_label(mask, connectivity):
    """Raster index of the first voxel, from scipy's labels."""
    structure = ndimage.generate_binary_structure(3, 1 if connectivity == 6 else 3)
    number, count = ndimage.label(mask, structure)
    first = np.full(count + 1, -1)
    flat = number.reshape(-1)
    for index in range(flat.size - 1, -1, -1):
        first[flat[index]] = index
    first[0] = -1
    return first[number]


@pytest.mark.parametrize("connectivity", [6, 26])
@settings(deadline=None, max_examples=50)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_labels_are_those_of_a_depth_first_search(
    connectivity, mask_kinds, make_mask, depth_first, data, seed
):
    mask = make_mask(data.draw(st.sampled_from(mask_kinds)), seed, SHAPE)
    expected = depth_first(mask, connectivity)
    np.testing.assert_array_equal(scipy_label(mask, connectivity), expected)
    np.testing.assert_array_equal(label(mask, connectivity), expected)


@pytest.mark.parametrize("connectivity", [6, 26])
def test_large_windings_are_one_component(connectivity, mask_kinds, make_mask):
    for kind in mask_kinds:
        mask = make_mask(kind, 3, (9, 33, 31))
        np.testing.assert_array_equal(label(mask, connectivity), scipy_label(mask, connectivity))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 6), (4, 1, 6), (4, 5, 1), (2, 1, 1)])
@pytest.mark.parametrize("connectivity", [6, 26])
def test_thin_volumes(shape, connectivity, depth_first):
    mask = np.random.default_rng(1).random(shape) < 0.6
    np.testing.assert_array_equal(label(mask, connectivity), depth_first(mask, connectivity))


def test_neighbours_do_not_wrap_around_rows_or_slices():
    row_ends = np.zeros((1, 3, 4), bool)
    row_ends[0, 0, 3] = row_ends[0, 1, 0] = True
    slice_ends = np.zeros((2, 3, 4), bool)
    slice_ends[0, 2, 1] = slice_ends[1, 0, 1] = True
    for mask in (row_ends, slice_ends):
        for connectivity in (6, 26):
            assert len(np.unique(label(mask, connectivity))) == 3


def test_corners_touch_only_with_26_neighbours():
    mask = np.zeros((2, 2, 2), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = True
    assert len(np.unique(label(mask, 6))) == 3
    assert len(np.unique(label(mask, 26))) == 2


@pytest.mark.parametrize("connectivity", [6, 26])
def test_planes_are_labelled_on_their_own(connectivity, make_mask, depth_first):
    mask = make_mask("noise", 5, SHAPE)
    got = np.asarray(jax.jit(plane_components, static_argnums=1)(mask, connectivity))
    for index, plane in enumerate(mask):
        expected = depth_first(plane[None], connectivity)[0] + index * plane.size
        np.testing.assert_array_equal(got[index][plane], expected[plane])
    own = np.arange(mask.size).reshape(mask.shape)
    np.testing.assert_array_equal(got[~mask], own[~mask])


def test_sizes_count_each_component_once(make_mask):
    mask = make_mask("noise", 7, SHAPE)
    labels = label(mask, 6)
    sizes = np.asarray(jax.jit(component_sizes)(labels, mask))
    values, counts = np.unique(np.asarray(labels)[mask], return_counts=True)
    expected = np.zeros(mask.size, int)
    expected[values] = counts
    np.testing.assert_array_equal(sizes, expected)


def test_loop_vmap_pmap_shard_map_and_eager_agree(mask_kinds, make_mask):
    connectivity = 26
    masks = np.stack([make_mask(mask_kinds[i], i, SHAPE) for i in range(8)])
    loop = np.stack([label(mask, connectivity) for mask in masks])
    one = functools.partial(label_components, connectivity=connectivity)
    np.testing.assert_array_equal(jax.pmap(one)(masks), loop)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(jax.vmap(one), mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_array_equal(jax.jit(sharded)(masks), loop)
    with jax.disable_jit():
        np.testing.assert_array_equal(one(jnp.asarray(masks[1][:2])), label(masks[1][:2], 26))
