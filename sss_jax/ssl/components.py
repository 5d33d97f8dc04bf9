"""Connected components of volumes inside jit: fixed shapes, no callback, right for every mask.

The graph is contracted in three steps: runs along a row, rows to slices, slices to volumes.
Each contraction hooks the parent of a node onto the smallest label next to it and shortens the
pointers (parent-connect and shortcut, Liu and Tarjan 2019), until nothing changes. A label is the
raster index of the first voxel of its component, so that ties are broken by raster order.
"""

import jax.numpy as jnp
from jax import lax

from sss_jax.axes import Array, Bool, Int

_FAR = jnp.iinfo(jnp.int32).max


def _shift(array: Array, step: int, axis: int, fill: int) -> Array:
    """Move an array by `step` places along an axis; vacated places hold `fill`."""
    size = array.shape[axis]
    widths = [(0, 0)] * array.ndim
    widths[axis] = (max(step, 0), max(-step, 0))
    padded = jnp.pad(array, widths, constant_values=fill)
    return lax.slice_in_dim(padded, max(-step, 0), max(-step, 0) + size, axis=axis)


def _beside(array: Array, axis: int, fill: int = _FAR) -> Array:
    """Smallest value of the two neighbours along an axis."""
    return jnp.minimum(_shift(array, 1, axis, fill), _shift(array, -1, axis, fill))


def _nearest(label_SHW: Array, axis: int, connectivity: int) -> Array:
    """Smallest label among the neighbours on the rows (axis 1) or slices (axis 0) beside."""
    if connectivity == 26:  # the square of diagonal neighbours is separable
        for inner in range(axis + 1, 3):
            label_SHW = jnp.minimum(label_SHW, _beside(label_SHW, inner))
    return _beside(label_SHW, axis)


def _contract(
    node_SHW: Int[Array, "S H W"], mask_SHW: Bool[Array, "S H W"], axis: int, connectivity: int
) -> Int[Array, "S H W"]:
    """Merge nodes that touch across an axis.

    A pass without a change ends the loop; then every pointer leads straight to a root and the
    ends of every edge share it, which is the definition of the components. Pointers only ever
    fall, so that point is always reached.
    """
    node_V = node_SHW.reshape(-1)

    def hook(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        parent_V, label_V, _ = state
        label_SHW = jnp.where(mask_SHW, label_V.reshape(mask_SHW.shape), _FAR)
        near_SHW = jnp.where(mask_SHW, _nearest(label_SHW, axis, connectivity), _FAR)
        new_V = parent_V.at[label_V].min(near_SHW.reshape(-1), mode="promise_in_bounds")
        for _ in range(2):
            new_V = new_V.at[new_V].get(mode="promise_in_bounds")
        label_V = new_V.at[node_V].get(mode="promise_in_bounds")
        return new_V, label_V, jnp.any(new_V != parent_V)

    start_V = jnp.arange(node_V.size, dtype=jnp.int32)
    # The mask decides, not a constant: the flag must vary over devices as the mask does.
    state = (start_V + 0 * node_V, node_V, jnp.any(mask_SHW))
    _, label_V, _ = lax.while_loop(lambda state: state[2], hook, state)
    return label_V.reshape(node_SHW.shape)


def _runs(mask_SHW: Bool[Array, "S H W"]) -> Int[Array, "S H W"]:
    """Label each run of a row with its first voxel's raster index, background with its own."""
    index_SHW = jnp.arange(mask_SHW.size, dtype=jnp.int32).reshape(mask_SHW.shape)
    before_SHW = _shift(mask_SHW, 1, 2, 0)
    node_SHW = jnp.where(mask_SHW & before_SHW, -1, index_SHW)
    step = 1
    while step < mask_SHW.shape[2]:
        node_SHW = jnp.maximum(node_SHW, _shift(node_SHW, step, 2, -1))
        step *= 2
    return node_SHW


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
