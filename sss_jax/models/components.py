"""Connected components of volumes inside jit: fixed shapes, no callback, right for every mask.

The graph is contracted in three steps: runs along a row, rows to slices, slices to volumes.
Each contraction hooks the parent of a node onto the smallest label next to it and shortens the
pointers (parent-connect and shortcut, Liu and Tarjan 2019), until nothing changes. A label is the
raster index of the first voxel of its component, so that ties are broken by raster order.
"""

import math

import jax.numpy as jnp
from jax import lax

from sss_jax.axes import Array, Bool, Int

_FAR = jnp.iinfo(jnp.int32).max
_JUMPS = 3  # per pass; fewer need more passes on long windings, more cost more than they save


def _neighbourhood(label_SHW: Array, axis: int) -> Array:
    """Smallest label within one place of each voxel, along all axes after `axis`."""
    for inner in range(axis + 1, 3):
        window = [3 if i == inner else 1 for i in range(3)]
        label_SHW = lax.reduce_window(label_SHW, _FAR, lax.min, window, (1, 1, 1), "SAME")
    return label_SHW


def _contract(
    node_SHW: Int[Array, "S H W"], mask_SHW: Bool[Array, "S H W"], axis: int, connectivity: int
) -> Int[Array, "S H W"]:
    """Merge nodes that touch across an axis (0: between slices, 1: between rows).

    A pass without a change ends the loop; then every pointer leads straight to a root and the
    ends of every edge share it, which is the definition of the components. Pointers only ever
    fall, so that point is always reached.

    Neighbours are `step` voxels apart in the flat volume: two shifted views of one array, which
    is several times faster on a CPU than padding.
    """
    shape = mask_SHW.shape
    step = math.prod(shape[axis + 1 :])
    node_V, mask_V = node_SHW.reshape(-1), mask_SHW.reshape(-1)
    inside_V = lax.broadcasted_iota(jnp.int32, shape, axis).reshape(-1) < shape[axis] - 1
    lower_E = mask_V[:-step] & inside_V[:-step]
    upper_E = mask_V[step:] & inside_V[:-step]

    def hook(parent_V: Array, label_V: Array) -> Array:
        below_E, above_E = label_V[:-step], label_V[step:]
        if connectivity == 6:
            root_E, near_E = jnp.maximum(below_E, above_E), jnp.minimum(below_E, above_E)
            near_E = jnp.where(lower_E & upper_E, near_E, _FAR)
            return parent_V.at[root_E].min(near_E, mode="promise_in_bounds")
        wide_V = jnp.where(mask_V, label_V, _FAR).reshape(shape)
        wide_V = _neighbourhood(wide_V, axis).reshape(-1)
        for root_E, near_E, edge_E in (
            (below_E, wide_V[step:], lower_E),
            (above_E, wide_V[:-step], upper_E),
        ):
            near_E = jnp.where(edge_E, near_E, _FAR)
            parent_V = parent_V.at[root_E].min(near_E, mode="promise_in_bounds")
        return parent_V

    def advance(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        parent_V, label_V, _ = state
        new_V = hook(parent_V, label_V)
        for _ in range(_JUMPS):
            new_V = new_V.at[new_V].get(mode="promise_in_bounds")
        label_V = new_V.at[node_V].get(mode="promise_in_bounds")
        return new_V, label_V, jnp.any(new_V != parent_V)

    # Written with the nodes and the mask, so that the state varies over devices as they do.
    start_V = jnp.arange(node_V.size, dtype=jnp.int32) + 0 * node_V
    state = (start_V, node_V, jnp.any(lower_E))
    _, label_V, _ = lax.while_loop(lambda state: state[2], advance, state)
    return label_V.reshape(shape)


def _runs(mask_SHW: Bool[Array, "S H W"]) -> Int[Array, "S H W"]:
    """Label each run of a row with its first voxel's raster index, background with its own."""
    mask_V = mask_SHW.reshape(-1)
    index_V = jnp.arange(mask_V.size, dtype=jnp.int32)
    width = mask_SHW.shape[2]
    before_V = jnp.concatenate([jnp.zeros(1, bool), mask_V[:-1]])
    goes_on_V = mask_V & before_V & (index_V % width != 0)
    node_V = jnp.where(goes_on_V, -1, index_V)
    step = 1
    while step < width:  # a running maximum; a row starts with its own index, so none leaks in
        earlier_V = jnp.concatenate([jnp.full(step, -1, jnp.int32), node_V[:-step]])
        node_V = jnp.maximum(node_V, earlier_V)
        step *= 2
    return node_V.reshape(mask_SHW.shape)


def plane_components(mask_SHW: Bool[Array, "S H W"], connectivity: int = 6) -> Int[Array, "S H W"]:
    """Label the components of every slice by itself.

    Args:
        mask_SHW: foreground.
        connectivity: 6 (4 neighbours in the plane) or 26 (8 neighbours in the plane).

    Returns:
        Raster index of the first voxel of each voxel's component; background has its own index.
    """
    return _contract(_runs(mask_SHW), mask_SHW, 1, connectivity)


def join_planes(
    node_SHW: Int[Array, "S H W"], mask_SHW: Bool[Array, "S H W"], connectivity: int = 6
) -> Int[Array, "S H W"]:
    """Merge in-plane components that touch between slices.

    Args:
        node_SHW: labels as `plane_components` makes them, for these slices.
        mask_SHW: foreground; slices without any leave the volume.
        connectivity: 6 or 26.

    Returns:
        Raster index of the first voxel of each voxel's component; background has its own index.
    """
    return _contract(node_SHW, mask_SHW, 0, connectivity)


def label_components(mask_SHW: Bool[Array, "S H W"], connectivity: int = 6) -> Int[Array, "S H W"]:
    """Label the 3D components of a volume.

    Args:
        mask_SHW: foreground.
        connectivity: 6 (faces) or 26 (faces, edges and corners).

    Returns:
        Raster index of the first voxel of each voxel's component, -1 in the background.
    """
    node_SHW = plane_components(mask_SHW, connectivity)
    return jnp.where(mask_SHW, join_planes(node_SHW, mask_SHW, connectivity), -1)


def component_sizes(
    label_SHW: Int[Array, "S H W"], mask_SHW: Bool[Array, "S H W"]
) -> Int[Array, " V"]:
    """Count the voxels of each component, at the raster index of its first voxel; else 0."""
    size_V = jnp.zeros(mask_SHW.size, jnp.int32)
    voxel_V = mask_SHW.reshape(-1).astype(jnp.int32)
    return size_V.at[jnp.maximum(label_SHW.reshape(-1), 0)].add(voxel_V, mode="promise_in_bounds")
