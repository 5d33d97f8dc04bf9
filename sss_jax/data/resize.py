"""Separable resizing of slices as two matrix products: smooth, exact at the ends, no recompiling.

A resize by any factor, with padding, is `rows @ slice @ columns.T`; the matrices depend on sizes
alone and are kept. Shapes differ from case to case, which is why this is NumPy and not JAX.
"""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]

LEAD = 1e-6
"""How far a label's share must lead: more than rounding, so that ties go to the lower label."""


@functools.lru_cache(maxsize=256)
def resize_matrix(source: int, target: int, before: int = 0, total: int = 0) -> Matrix:
    """Return the weights of a linear resize, [total, source].

    Pixel centres are at half-integers. Where the target is smaller, the triangle kernel is
    widened so that no pixel is skipped (antialiasing). Rows sum to 1, rows of padding to 0.

    Args:
        source: samples in.
        target: samples out.
        before: rows of padding before the target.
        total: rows in all; 0 means no padding.
    """
    centres = (np.arange(target) + 0.5) * (source / target) - 0.5
    width = max(source / target, 1.0)
    distance = np.abs(np.arange(source)[None, :] - centres[:, None])
    weights = np.maximum(0.0, 1.0 - distance / width)
    weights /= weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((total or target, source), np.float32)
    matrix[before : before + target] = weights
    matrix.setflags(write=False)
    return matrix


def resize_image(image_SHW: NDArray[np.float32], rows: Matrix, columns: Matrix) -> Matrix:
    """Resize slices with the two matrices, [S, rows, columns]; values outside are 0.

    The very same array comes back where there is nothing to do.
    """
    if not _changes_nothing(rows):
        image_SHW = np.matmul(rows, image_SHW)
    return image_SHW if _changes_nothing(columns) else np.matmul(image_SHW, columns.T)


def _changes_nothing(matrix: Matrix) -> bool:
    """Tell an identity: its rows are weights that sum to 1, so the diagonal says it all."""
    return matrix.shape[0] == matrix.shape[1] and bool((matrix.diagonal() == 1.0).all())


def resize_labels(label_SHW: NDArray[np.uint8], rows: Matrix, columns: Matrix) -> NDArray[np.uint8]:
    """Resize labels by the largest share of the linearly resized one-hot planes.

    Ties go to the lower label and padding is 0. Only the rectangles that labels and classes can
    reach are computed, since most structures are small.
    """
    if _changes_nothing(rows) and _changes_nothing(columns):
        return label_SHW
    out = np.zeros((len(label_SHW), len(rows), len(columns)), np.uint8)
    for label_HW, target in zip(label_SHW, out, strict=True):
        if label_HW.any():
            source, area = _reach(label_HW, rows, columns)
            inner = rows[area[0], source[0]], columns[area[1], source[1]]
            target[area] = _largest_share(label_HW[source], *inner)
    return out


def _largest_share(label_HW: NDArray[np.uint8], rows: Matrix, columns: Matrix) -> NDArray[np.uint8]:
    out = np.zeros((len(rows), len(columns)), np.uint8)
    best = np.zeros(out.shape, np.float32)
    background = np.ones(out.shape, np.float32)
    for label in np.unique(label_HW[label_HW > 0]):
        plane = (label_HW == label).astype(np.float32)
        source, area = _reach(plane, rows, columns)
        share = rows[area[0], source[0]] @ plane[source] @ columns[area[1], source[1]].T
        background[area] -= share
        wins = share > best[area] + LEAD
        out[area][wins] = label
        best[area][wins] = share[wins]
    out[background >= best - LEAD] = 0
    return out


Block = tuple[slice, slice]


def _reach(plane_HW: NDArray[Any], rows: Matrix, columns: Matrix) -> tuple[Block, Block]:
    """Return the block that holds all that is not zero, and the one it can reach once resized."""
    source = _span(plane_HW, 1), _span(plane_HW, 0)
    area = _span(rows[:, source[0]], 1), _span(columns[:, source[1]], 1)
    return source, area


def _span(array: NDArray[Any], over: int) -> slice:
    """Return from the first to the last position that is not all zero over an axis."""
    found = np.flatnonzero(array.any(axis=over))
    return slice(int(found[0]), int(found[-1]) + 1) if found.size else slice(0, 0)
