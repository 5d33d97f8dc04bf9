"""Masks of every kind and a depth-first search, shared by the tests of components and PCSW."""

import itertools

import numpy as np
import pytest
from scipy import ndimage

KINDS = (
    "sparse noise",
    "noise",
    "dense noise",
    "blobs",
    "spiral",
    "maze",
    "checkerboard",
    "stripes",
    "empty",
    "full",
)


def _spiral(height, width):
    """One-pixel-wide arm that winds inwards with a one-pixel gap."""
    plane = np.zeros((height, width), bool)
    y, x, dy, dx = 0, 0, 0, 1
    plane[0, 0] = True

    def free(y, x):
        return not (0 <= y < height and 0 <= x < width and plane[y, x])

    while True:
        for _ in range(2):  # straight on, else turn right once
            ny, nx = y + dy, x + dx
            inside = 0 <= ny < height and 0 <= nx < width
            if inside and not plane[ny, nx] and free(ny + dy, nx + dx):
                break
            dy, dx = dx, -dy
        else:
            return plane
        y, x = ny, nx
        plane[y, x] = True


def _maze(rng, shape):
    """Spanning tree of the even cells: one component, one voxel wide, winding everywhere."""
    mask = np.zeros(shape, bool)
    stack, mask[0, 0, 0] = [(0, 0, 0)], True
    while stack:
        cell = np.array(stack[-1])
        steps = []
        for axis, sign in itertools.product(range(3), (-2, 2)):
            there = cell.copy()
            there[axis] += sign
            if 0 <= there[axis] < shape[axis] and not mask[tuple(there)]:
                steps.append(there)
        if not steps:
            stack.pop()
            continue
        there = steps[rng.integers(len(steps))]
        mask[tuple((cell + there) // 2)] = mask[tuple(there)] = True
        stack.append(tuple(there))
    return mask


def _make_mask(kind, seed, shape):
    rng = np.random.default_rng(seed)
    if kind == "sparse noise":
        return rng.random(shape) < 0.06
    if kind == "noise":
        return rng.random(shape) < 0.3
    if kind == "dense noise":
        return rng.random(shape) < 0.6
    if kind == "blobs":
        smooth = ndimage.gaussian_filter(rng.normal(size=shape), rng.uniform(0.8, 1.6))
        blobs = smooth > np.quantile(smooth, rng.uniform(0.5, 0.95))
        return blobs | (rng.random(shape) < rng.choice([0.0, 0.02]))
    if kind == "spiral":
        planes = np.broadcast_to(_spiral(*shape[1:]), shape)
        return planes & (rng.random((shape[0], 1, 1)) < 0.8)
    if kind == "maze":
        return np.flip(_maze(rng, shape), tuple(np.flatnonzero(rng.random(3) < 0.5)))
    if kind == "checkerboard":
        return (np.indices(shape).sum(axis=0) + seed) % 2 == 0
    if kind == "stripes":
        return np.indices(shape)[seed % 3] % 2 == 0
    return np.full(shape, kind == "full")


def _depth_first(mask, connectivity):
    """Label every component with the raster index of its first voxel, background with -1."""
    offsets = [
        step
        for step in itertools.product((-1, 0, 1), repeat=3)
        if (sum(map(abs, step)) == 1 if connectivity == 6 else any(step))
    ]
    label = np.full(mask.shape, -1)
    for index, start in enumerate(np.ndindex(mask.shape)):
        if not mask[start] or label[start] >= 0:
            continue
        stack, label[start] = [start], index
        while stack:
            voxel = stack.pop()
            for step in offsets:
                there = tuple(a + b for a, b in zip(voxel, step, strict=True))
                inside = all(0 <= a < n for a, n in zip(there, mask.shape, strict=True))
                if inside and mask[there] and label[there] < 0:
                    label[there] = index
                    stack.append(there)
    return label


@pytest.fixture(scope="session")
def mask_kinds():
    """Names that `make_mask` knows."""
    return KINDS


@pytest.fixture(scope="session")
def make_mask():
    """Function (kind, seed, shape) -> binary volume."""
    return _make_mask


@pytest.fixture(scope="session")
def depth_first():
    """Function (mask, connectivity) -> labels by a plain depth-first search."""
    return _depth_first
