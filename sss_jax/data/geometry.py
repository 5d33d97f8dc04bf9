"""Between stored volumes and stacks of upright slices, without loss.

A stored axis may run along any body axis in either direction. `to_slices` turns every volume the
same way, so that a network sees equal pixels however a scanner or a tool stored the scene:

| cut along | S runs towards | rows H run from-to | columns W run from-to |
|---|---|---|---|
| 2, axial (default) | head | front to back | right to left |
| 1, coronal | front | head to feet | right to left |
| 0, sagittal | right | head to feet | front to back |

These are the views of radiology: the patient's right is on the left of an axial slice. A volume
without orientation is not turned: S, H, W are stored axes (2, 1, 0), and for other slice axes the
higher stored axis likewise runs along the rows.
"""

import dataclasses
from typing import Any

import numpy as np
from nibabel.orientations import io_orientation
from numpy.typing import NDArray

from sss_jax.data.nifti import Volume

_COARSER = 1.2


@dataclasses.dataclass(frozen=True)
class Frame:
    """How a stored volume became slices.

    Attributes:
        shape: stored shape.
        axes: the stored axis behind S, H and W.
        flips: whether S, H and W run against their stored axis.
        spacing: distance of neighbours along S, H and W, mm (voxels where unknown).
        slice_axis: the canonical (right, front, head) axis behind S.
    """

    shape: tuple[int, int, int]
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    spacing: tuple[float, float, float]
    slice_axis: int

    @property
    def plane(self) -> tuple[int, int]:
        """Rows and columns of a slice."""
        return self.shape[self.axes[1]], self.shape[self.axes[2]]


def make_frame(volume: Volume, slice_axis: int) -> Frame:
    """Choose the turn of a volume.

    Args:
        volume: the stored volume.
        slice_axis: canonical axis (0 right, 1 front, 2 head) to cut along; -1 takes the one whose
            spacing exceeds both others by more than a fifth, else 2.
    """
    stored, against = _canonical(volume)
    spacing = [volume.spacing[axis] for axis in stored]
    cut = coarsest(spacing) if slice_axis == -1 else slice_axis
    columns, rows = (axis for axis in range(3) if axis != cut)
    # Rows and columns run against right, front and head; slices run with them.
    turn = volume.oriented
    flips = (against[cut], against[rows] ^ turn, against[columns] ^ turn)
    s, h, w = stored[cut], stored[rows], stored[columns]
    x, y, z = volume.array.shape
    space = (spacing[cut], spacing[rows], spacing[columns])
    return Frame((x, y, z), (s, h, w), flips, space, cut)


def coarsest(spacing: list[float]) -> int:
    """Return the axis with clearly the largest spacing, or 2 where none stands out."""
    widest = int(np.argmax(spacing))
    others = [s for axis, s in enumerate(spacing) if axis != widest]
    return widest if spacing[widest] > _COARSER * max(others) else 2


def _canonical(volume: Volume) -> tuple[list[int], list[bool]]:
    """Return, for right, front and head, the closest stored axis and if it runs the other way."""
    if not volume.oriented:
        return [0, 1, 2], [False, False, False]
    orientation = io_orientation(volume.affine)
    stored = [int(np.flatnonzero(orientation[:, 0] == axis)[0]) for axis in range(3)]
    return stored, [bool(orientation[axis, 1] < 0) for axis in stored]


def to_slices(volume: Volume, slice_axis: int) -> tuple[NDArray[Any], Frame]:
    """Turn a stored volume into upright slices.

    Returns:
        A view of the array as [S, H, W], and the frame for the way back.
    """
    frame = make_frame(volume, slice_axis)
    return turn(volume.array, frame), frame


def turn(array_XYZ: NDArray[Any], frame: Frame) -> NDArray[Any]:
    """Turn a stored array, e.g. labels, as its frame says; returns a view, [S, H, W]."""
    return np.flip(np.transpose(array_XYZ, frame.axes), _flipped(frame))


def from_slices(array_SHW: NDArray[Any], frame: Frame) -> NDArray[Any]:
    """Undo `turn` exactly; returns a view in storage order, [X, Y, Z]."""
    return np.transpose(np.flip(array_SHW, _flipped(frame)), np.argsort(frame.axes))


def _flipped(frame: Frame) -> tuple[int, ...]:
    return tuple(axis for axis, flip in enumerate(frame.flips) if flip)
