"""Points of a stored volume on its upright slices."""

import numpy as np
from numpy.typing import NDArray

from sss_jax.data.geometry import Frame

Points = NDArray[np.float64]


def to_upright(voxel_N3: Points, frame: Frame) -> Points:
    """Turn voxels the way `geometry.turn` turns a volume.

    Args:
        voxel_N3: indices along the stored axes; whole numbers are voxel centres.
        frame: the turn.

    Returns:
        Slice, row and column of each, [N, 3].
    """
    axes = list(frame.axes)
    turned = np.asarray(voxel_N3, np.float64)[:, axes]
    last = np.array([frame.shape[axis] - 1 for axis in axes], np.float64)
    return np.where(np.array(frame.flips)[None], last[None] - turned, turned)


def to_voxels(world_N3: Points, affine: NDArray[np.float64]) -> Points:
    """World coordinates (mm, RAS+) as indices along the stored axes."""
    world = np.asarray(world_N3, np.float64)
    homogeneous = np.concatenate([world, np.ones((len(world), 1))], axis=1)
    return (homogeneous @ np.linalg.inv(affine).T)[:, :3]
