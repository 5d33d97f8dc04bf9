"""Separable resizing of slices as two matrix products: smooth, exact at the ends, no recompiling.

A resize by any factor, with padding, is `rows @ slice @ columns.T`; the matrices depend on sizes
alone and are kept. Shapes differ from case to case, which is why this is NumPy and not JAX.
"""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]


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
    distance = np.abs(np.arange(source)[None, :] - np.clip(centres, 0, source - 1)[:, None])
    weights = np.maximum(0.0, 1.0 - distance / width)
    weights /= weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((total or target, source), np.float32)
    matrix[before : before + target] = weights
    matrix.setflags(write=False)
    return matrix


def resize_image(image_SHW: NDArray[np.float32], rows: Matrix, columns: Matrix) -> Matrix:
    """Resize slices with the two matrices, [S, rows, columns]; values outside are 0."""
    return np.matmul(np.matmul(rows, image_SHW), columns.T)


def resize_labels(label_SHW: NDArray[np.uint8], rows: Matrix, columns: Matrix) -> NDArray[np.uint8]:
    """Resize labels by the largest share of the linearly resized one-hot planes.

    Ties go to the lower label and padding is 0. Only the block that a class can reach is
    computed, since most classes are small.
    """
    out = np.zeros((len(label_SHW), len(rows), len(columns)), np.uint8)
    best = np.zeros(out.shape, np.float32)
    background = np.ones(out.shape, np.float32)
    for label in np.unique(label_SHW[label_SHW > 0]):
        plane = label_SHW == label
        first, last = _span(plane, axis=(1, 2))
        top, bottom = _span(plane, axis=(0, 2))
        left, right = _span(plane, axis=(0, 1))
        high, low = _span(rows[:, top:bottom], axis=1)
        start, stop = _span(columns[:, left:right], axis=1)
        share = resize_image(
            plane[first:last, top:bottom, left:right].astype(np.float32),
            rows[high:low, top:bottom],
            columns[start:stop, left:right],
        )
        area = np.s_[first:last, high:low, start:stop]
        background[area] -= share
        # A share counts when it leads by more than rounding, so that ties go to the lower label.
        wins = share > best[area] + 1e-6
        out[area][wins] = label
        best[area][wins] = share[wins]
    out[background >= best - 1e-6] = 0
    return out


def _span(array: NDArray[Any], axis: int | tuple[int, ...]) -> tuple[int, int]:
    """Return the first and one past the last position that is not all zero, else (0, 0)."""
    found = np.flatnonzero(array.any(axis=axis))
    return (int(found[0]), int(found[-1]) + 1) if found.size else (0, 0)
