"""From a stored volume to the network's square slices, and from probabilities back to voxels.

Pure functions on NumPy arrays: `scan` turns and scales a volume, `place` fits its slices to the
square, `restore_labels` goes the whole way back.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sss_jax.data.faults import FileFault
from sss_jax.data.geometry import Frame, from_slices, make_frame, turn
from sss_jax.data.nifti import Volume, refuse_other_grid
from sss_jax.data.resize import Matrix, resize_image, resize_labels, resize_matrix
from sss_jax.errors import DataError
from sss_jax.options import DataOptions

Image = NDArray[np.float32]
Labels = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the slices of a volume lie in the network's square.

    Attributes:
        frame: the way back to storage order.
        plane: native rows and columns of a slice.
        box: top, left, height, width of the slice in the square, pixels.
        size: side of the square, pixels.
    """

    frame: Frame
    plane: tuple[int, int]
    box: tuple[int, int, int, int]
    size: int


@dataclasses.dataclass(frozen=True, eq=False)
class Scan:
    """A volume as upright native slices, intensities in [0, 1].

    Attributes:
        image_SHW: intensities.
        label_SHW: labels, where they are known.
        frame: the way back to storage order.
    """

    image_SHW: Image
    label_SHW: Labels | None
    frame: Frame

    @property
    def nbytes(self) -> int:
        """Memory of the arrays, bytes."""
        return self.image_SHW.nbytes + (0 if self.label_SHW is None else self.label_SHW.nbytes)

    @property
    def depth(self) -> int:
        """Number of slices."""
        return len(self.image_SHW)

    @property
    def with_label(self) -> NDArray[np.int64] | None:
        """Slices that show a label, ascending; None where labels are not known."""
        return None if self.label_SHW is None else np.flatnonzero(self.label_SHW.any(axis=(1, 2)))

    def read(self, slices: NDArray[np.int64] | None = None) -> "Scan":
        """Return the listed slices, or all, as a scan of their own."""
        if slices is None:
            return self
        label = None if self.label_SHW is None else self.label_SHW[slices]
        return Scan(self.image_SHW[slices], label, self.frame)


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """Slices fitted to the network's square.

    Attributes:
        image_SHW: intensities in [0, 1], H = W = image size, padding 0.
        label_SHW: labels, where they are known, padding 0.
        placement: the way back.
    """

    image_SHW: Image
    label_SHW: Labels | None
    placement: Placement


def rescale(array: Image, low: float, high: float) -> Image:
    """Map low..high to 0..1 and clip; every voxel by itself, so that any part may be scaled."""
    scaled = np.clip((array - np.float32(low)) / np.float32(high - low), 0.0, 1.0)
    return scaled.astype(np.float32, copy=False)


def intensity_range(array: Image, options: DataOptions) -> tuple[float, float]:
    """Return the intensities of a volume that become 0 and 1.

    Args:
        array: the whole volume, so that all its slices share one scale.
        options: `percentile` clips to two percentiles, `min_max` keeps the extremes, `window`
            clips to a fixed range (CT, HU). Where the two percentiles are equal, as in a volume
            that is almost all background, the extremes serve instead.

    Raises:
        ValueError: all intensities are equal after the scaling.
    """
    extremes = float(array.min()), float(array.max())
    low, high = _range(array, extremes, options)
    darkest, brightest = rescale(np.array(extremes, np.float32), low, high)
    if darkest == brightest:
        raise ValueError(
            f"intensities {extremes[0]:g}..{extremes[1]:g} leave nothing of {low:g}..{high:g}"
        )
    return low, high


def range_of(volume: Volume, options: DataOptions) -> tuple[float, float]:
    """Return the `intensity_range` of a volume from a file.

    Raises:
        FileFault: nothing is left after the scaling.
    """
    try:
        return intensity_range(volume.array, options)
    except ValueError as error:
        fix = "set data.normalise, or data.window_low and data.window_high"
        raise FileFault(volume.path, str(error), fix) from error


def _range(
    array: Image, extremes: tuple[float, float], options: DataOptions
) -> tuple[float, float]:
    if options.normalise == "window":
        return options.window_low, options.window_high
    if options.normalise == "min_max":
        return extremes
    ends = (options.percentile_low, options.percentile_high)
    low, high = (float(p) for p in np.percentile(array, ends))
    return (low, high) if low < high else extremes


def place_plane(frame: Frame, plane: tuple[int, int], size: int, fit: str) -> Placement:
    """Choose where a slice lies in the square.

    Args:
        frame: turn and spacing of the volume.
        plane: native rows and columns.
        size: side of the square, pixels.
        fit: "letterbox" centres the slice, in its true proportions, and touches two sides;
            "stretch" fills the square.
    """
    if fit == "stretch":
        return Placement(frame, plane, (0, 0, size, size), size)
    extent = plane[0] * frame.spacing[1], plane[1] * frame.spacing[2]
    height, width = (max(1, round(size * side / max(extent))) for side in extent)
    return Placement(frame, plane, ((size - height) // 2, (size - width) // 2, height, width), size)


def _into_square(placement: Placement) -> tuple[Matrix, Matrix]:
    (rows, columns), (top, left, height, width) = placement.plane, placement.box
    size = placement.size
    return resize_matrix(rows, height, top, size), resize_matrix(columns, width, left, size)


def resize_plane(
    array_SHW: NDArray[Any], size: int, fit: str, spacing: tuple[float, float] = (1.0, 1.0)
) -> NDArray[Any]:
    """Fit slices to a square; float arrays are images, integer arrays are labels.

    Args:
        array_SHW: native slices.
        size: side of the square, pixels.
        fit: "letterbox" or "stretch", see `place_plane`.
        spacing: distance of neighbouring rows and columns.
    """
    slices, rows, columns = array_SHW.shape
    shape = (slices, rows, columns)
    frame = Frame(shape, (0, 1, 2), (False, False, False), (1.0, *spacing), 0)
    into = _into_square(place_plane(frame, (rows, columns), size, fit))
    return (resize_image if array_SHW.dtype.kind == "f" else resize_labels)(array_SHW, *into)


def scan(volume: Volume, labels: Volume | None, options: DataOptions) -> Scan:
    """Turn a volume upright and scale its intensities; labels go the same way.

    Raises:
        FileFault: labels on another grid, or nothing left after the intensity scaling.
    """
    image = rescale(volume.array, *range_of(volume, options))
    if labels is not None:
        refuse_other_grid(labels, labels.path, volume)
    frame = make_frame(volume, options.slice_axis)
    label = None if labels is None else np.ascontiguousarray(turn(labels.array, frame))
    return Scan(np.ascontiguousarray(turn(image, frame)), label, frame)


def place(scan: Scan, size: int, options: DataOptions) -> Example:
    """Fit the slices of a scan to the square."""
    rows, columns = scan.image_SHW.shape[1:]
    placement = place_plane(scan.frame, (rows, columns), size, options.fit)
    into = _into_square(placement)
    image = resize_image(scan.image_SHW, *into)
    if image is not scan.image_SHW:
        np.clip(image, 0.0, 1.0, out=image)
    label = None if scan.label_SHW is None else resize_labels(scan.label_SHW, *into)
    return Example(image, label, placement)


def refuse_large(frame: Frame, path: Path, options: DataOptions) -> None:
    """Refuse slices that the canvas cannot hold.

    Raises:
        FileFault: they are larger than `data.canvas`.
    """
    if 0 < options.canvas < max(frame.plane):
        raise FileFault(path, *_too_large(frame.plane, options.canvas))


def lay(
    scan: Scan, size: int, options: DataOptions
) -> tuple[Image, Labels | None, NDArray[np.int32]]:
    """Lay the slices of a scan on the canvas as they are; `augment.fit` resizes them later.

    Args:
        scan: slices, not larger than `data.canvas`.
        size: side of the network's square, pixels.
        options: canvas and fit.

    Returns:
        Image and labels at the top left of [S, canvas, canvas], and where the square shows them:
        rows, height, top, columns, width and left, pixels.

    Raises:
        DataError: the slices are larger than the canvas.
    """
    rows, columns = plane = scan.frame.plane
    if max(plane) > options.canvas:
        problem, fix = _too_large(plane, options.canvas)
        raise DataError(f"a volume {problem}: {fix}")
    top, left, height, width = place_plane(scan.frame, plane, size, options.fit).box
    image = _on_canvas(scan.image_SHW, options.canvas)
    label = None if scan.label_SHW is None else _on_canvas(scan.label_SHW, options.canvas)
    return image, label, np.array([rows, height, top, columns, width, left], np.int32)


def _too_large(plane: tuple[int, int], canvas: int) -> tuple[str, str]:
    problem = f"has slices of {plane[0]} x {plane[1]} pixels, larger than data.canvas={canvas}"
    return problem, "raise data.canvas, or set it to 0 to resize before slices travel"


def _on_canvas(array_SHW: NDArray[Any], canvas: int) -> NDArray[Any]:
    slices, rows, columns = array_SHW.shape
    if rows == columns == canvas:
        return array_SHW
    out = np.zeros((slices, canvas, canvas), array_SHW.dtype)
    out[:, :rows, :columns] = array_SHW
    return out


def prepare(volume: Volume, labels: Volume | None, size: int, options: DataOptions) -> Example:
    """Turn, scale and fit a whole volume.

    Args:
        volume: the image.
        labels: its labels, where known.
        size: side of the network's square input, pixels.
        options: intensity scaling, slice axis and fit.
    """
    return place(scan(volume, labels, options), size, options)


def restore_probabilities(prob_SHWK: Image, placement: Placement) -> Image:
    """Resize probabilities from the square back to the native slices, [S, h, w, K]."""
    top, left, height, width = placement.box
    inner = prob_SHWK[:, top : top + height, left : left + width]
    rows = resize_matrix(height, placement.plane[0])
    columns = resize_matrix(width, placement.plane[1])
    # Matrix products are slow on planes that are not contiguous.
    planes = np.ascontiguousarray(np.moveaxis(inner, -1, 1), np.float32)
    return np.moveaxis(np.matmul(np.matmul(rows, planes), columns.T), 1, -1)


def restore_labels(prob_SHWK: Image, placement: Placement) -> Labels:
    """Return the most likely class of every voxel, in storage order and shape.

    Args:
        prob_SHWK: probabilities of the background and the classes, for every slice of the volume.
        placement: as `prepare` made it.
    """
    label = np.empty((len(prob_SHWK), *placement.plane), np.uint8)
    for index, plane_HWK in enumerate(_native_planes(prob_SHWK, placement)):
        label[index] = plane_HWK.argmax(axis=-1)
    return np.ascontiguousarray(from_slices(label, placement.frame))


def restore_confident(
    prob_SHWK: Image, placement: Placement, least: float
) -> tuple[Labels, Labels]:
    """Return the labels of `restore_labels`, and the same without what is not sure.

    Args:
        prob_SHWK: as for `restore_labels`.
        placement: as `prepare` made it.
        least: in the second map, voxels whose largest probability is below it are background.
    """
    label = np.empty((2, len(prob_SHWK), *placement.plane), np.uint8)
    for index, plane_HWK in enumerate(_native_planes(prob_SHWK, placement)):
        label[0, index] = best_HW = plane_HWK.argmax(axis=-1)
        label[1, index] = np.where(plane_HWK.max(axis=-1) < least, 0, best_HW)
    every, sure = (np.ascontiguousarray(from_slices(x, placement.frame)) for x in label)
    return every, sure


def _native_planes(prob_SHWK: Image, placement: Placement) -> Iterator[Image]:
    """Yield the probabilities of each slice at native size, [h, w, K]."""
    frame = placement.frame
    slices = frame.shape[frame.axes[0]]
    if len(prob_SHWK) != slices:
        raise ValueError(f"{len(prob_SHWK)} slices of probabilities for a volume of {slices}")
    # One slice at a time: all classes of a whole CT at native size need many gigabytes.
    for index in range(slices):
        yield restore_probabilities(prob_SHWK[index : index + 1], placement)[0]
