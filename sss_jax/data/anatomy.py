"""Shapes of the phantoms: a torso-like body and its organs, as tissue numbers on a fine grid.

Everything is a function of one `numpy.random.Generator`. Coordinates are relative to the body:
u to the right, v to the front, w to the head; the trunk spans about -1..1 in u and w.
"""

import dataclasses
import enum
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

FloatArray = NDArray[np.float32]
Field = Callable[[FloatArray, FloatArray, FloatArray], FloatArray]


class Tissue(enum.IntEnum):
    """What a voxel of a phantom is made of."""

    AIR = 0
    FAT = 1
    MUSCLE = 2
    VISCERAL = 3
    BONE = 4
    CORD = 5
    SPLEEN = 6
    KIDNEY = 7
    BOWEL_WALL = 8
    BOWEL_LUMEN = 9
    VEIN = 10
    LIVER = 11
    HEART_WALL = 12
    BLOOD = 13
    ARTERY = 14


CLASS_NAMES = ("organ", "wall", "vessel")
CLASS_OF_TISSUE = np.zeros(len(Tissue), np.uint8)
CLASS_OF_TISSUE[[Tissue.LIVER, Tissue.HEART_WALL, Tissue.ARTERY]] = (1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """Body coordinates of every sample of a grid, axes (x, y, slice)."""

    u: FloatArray
    v: FloatArray
    w: FloatArray


def smooth_noise(
    rng: np.random.Generator, shape: tuple[int, ...], knots: tuple[int, ...]
) -> FloatArray:
    """Draw a smooth random field of about unit spread: a coarse grid, cubically interpolated.

    Args:
      rng: source of the random numbers.
      shape: samples of the field.
      knots: samples of the coarse grid along the same axes, at least 2 each.
    """
    field = rng.standard_normal(knots).astype(np.float32)
    for axis, (size, coarse) in enumerate(zip(shape, knots, strict=True)):
        positions = np.linspace(0.0, coarse - 1.0, size)
        weights = ndimage.map_coordinates(
            np.eye(coarse, dtype=np.float32),
            np.meshgrid(positions, np.arange(coarse), indexing="ij"),
            order=min(3, coarse - 1),
            mode="nearest",
        )
        field = np.moveaxis(np.tensordot(weights, field, axes=(1, axis)), 0, axis)
    return np.ascontiguousarray(field, dtype=np.float32)


def body_coordinates(
    rng: np.random.Generator, shape: tuple[int, int, int], extent_mm: tuple[float, float, float]
) -> Coordinates:
    """Place a body in the field of view: pose, size and a smooth deformation.

    Args:
      rng: source of the random numbers.
      shape: samples (x, y, slice).
      extent_mm: size of the field of view, mm.
    """
    axes = [
        ((np.arange(n, dtype=np.float32) + 0.5) / n - 0.5) * e
        for n, e in zip(shape, extent_mm, strict=True)
    ]
    x, y, z = (axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :])
    angle = np.deg2rad(np.clip(rng.normal(0.0, 9.0), -25.0, 25.0))
    shift = rng.uniform(-7.0, 7.0, 3)
    half = rng.uniform((76.0, 56.0, 44.0), (92.0, 70.0, 58.0))
    tilt = rng.uniform(-0.12, 0.12, 2)
    x, y = x - shift[0] - tilt[0] * z, y - shift[1] - tilt[1] * z
    u = (np.cos(angle) * x + np.sin(angle) * y) / half[0]
    v = (-np.sin(angle) * x + np.cos(angle) * y) / half[0] * (64.0 / half[1])
    w = np.broadcast_to((z - shift[2]) / half[2], shape)
    bend = [0.05 * smooth_noise(rng, shape, (4, 4, 3)) for _ in range(2)]
    bend.append(0.09 * smooth_noise(rng, shape, (3, 3, 3)))
    u, v, w = ((a + d).astype(np.float32) for a, d in zip((u, v, w), bend, strict=True))
    return Coordinates(u, v, w)


def ellipsoid(
    centre: ArrayLike,
    radii: ArrayLike,
    degrees: float = 0.0,
    power: float = 2.0,
) -> Field:
    """Superellipsoid, turned about the long axis of the body; the field is below 1 inside."""
    x, y, z = np.asarray(centre, np.float32)
    long, wide, high = np.asarray(radii, np.float32)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))

    def field(u: FloatArray, v: FloatArray, w: FloatArray) -> FloatArray:
        a, b, c = u - x, v - y, (w - z) / high
        along, across = (cos * a + sin * b) / long, (cos * b - sin * a) / wide
        if power == 2.0:
            return along * along + across * across + c * c
        return np.abs(along) ** power + np.abs(across) ** power + np.abs(c) ** power

    return field


def _polynomial(coefficients: NDArray[np.float64], w: FloatArray) -> FloatArray:
    """Horner's scheme, highest power first."""
    value = np.zeros_like(w)
    for coefficient in coefficients:
        value = value * w + float(coefficient)
    return value


def tube(path: NDArray[np.float64], radius: NDArray[np.float64], flatten: float = 1.0) -> Field:
    """Tube along w; the field is below 1 inside.

    Args:
      path: polynomial coefficients of the centre, [2, n]: u(w) and v(w), highest power first.
      radius: polynomial coefficients of the radius in w, highest power first.
      flatten: cross-section's v extent divided by its u extent.
    """

    def field(u: FloatArray, v: FloatArray, w: FloatArray) -> FloatArray:
        size = np.maximum(_polynomial(radius, w), 0.02)
        du, dv = u - _polynomial(path[0], w), (v - _polynomial(path[1], w)) / flatten
        return (du * du + dv * dv) / (size * size)

    return field


class Canvas:
    """A tissue map that shapes are painted on, later ones over earlier ones."""

    def __init__(self, coordinates: Coordinates) -> None:
        """Start with air everywhere."""
        self._at = (coordinates.u.ravel(), coordinates.v.ravel(), coordinates.w.ravel())
        self._where = np.arange(coordinates.u.size)
        self.tissue = np.zeros(coordinates.u.shape, np.uint8)

    def confine(self) -> None:
        """Keep what is air now as air; later shapes cost only the samples that are left."""
        keep = self.tissue.ravel()[self._where] != Tissue.AIR
        self._where = self._where[keep]
        self._at = tuple(a[keep] for a in self._at)

    def paint(self, tissue: Tissue, field: Field, inside: tuple[Tissue, ...] = ()) -> None:
        """Paint where the field is below 1, within the given tissues if any are named."""
        samples = self._where[field(*self._at) < 1.0]
        flat = self.tissue.reshape(-1)
        if inside:
            samples = samples[np.isin(flat[samples], inside)]
        flat[samples] = tissue


def _trunk(canvas: Canvas, rng: np.random.Generator) -> None:
    power, fat = rng.uniform(2.1, 2.7), rng.uniform(0.05, 0.13)
    for tissue, shrink in (
        (Tissue.FAT, 0.0),
        (Tissue.MUSCLE, fat),
        (Tissue.VISCERAL, fat + rng.uniform(0.06, 0.1)),
    ):
        radii = (1.0 - shrink, 0.76 - shrink, 9.0)
        canvas.paint(tissue, ellipsoid((0.0, 0.0, 0.0), radii, power=power))
    for side in (-1.0, 1.0):
        centre = (0.17 * side, -0.52, 0.0)
        canvas.paint(Tissue.MUSCLE, ellipsoid(centre, (0.16, 0.14, 9.0), 20.0 * side))


def _spine(canvas: Canvas, rng: np.random.Generator) -> None:
    size = rng.uniform(0.12, 0.155)
    canvas.paint(Tissue.BONE, ellipsoid((0.0, -0.36, 0.0), (size, 0.85 * size, 9.0)))
    canvas.paint(Tissue.BONE, ellipsoid((0.0, -0.52, 0.0), (0.05, 0.13, 9.0)))
    canvas.paint(Tissue.CORD, ellipsoid((0.0, -0.50, 0.0), (0.045, 0.04, 9.0)))


def _kidneys(canvas: Canvas, rng: np.random.Generator) -> None:
    for side in (-1.0, 1.0):
        centre = (side * rng.uniform(0.40, 0.48), rng.uniform(-0.36, -0.26), -0.55)
        radii = (rng.uniform(0.11, 0.15), rng.uniform(0.15, 0.2), rng.uniform(0.5, 0.8))
        canvas.paint(Tissue.KIDNEY, ellipsoid(centre, radii, 25.0 * side))
        hilum = (centre[0] - 0.09 * side, centre[1] + 0.03, centre[2])
        canvas.paint(Tissue.VISCERAL, ellipsoid(hilum, (0.07, 0.06, 0.35), 25.0 * side))


def _bowel(canvas: Canvas, rng: np.random.Generator) -> None:
    for _ in range(rng.integers(4, 8)):
        centre = (rng.uniform(-0.6, 0.35), rng.uniform(-0.15, 0.42), rng.uniform(-1.2, -0.1))
        outer = rng.uniform((0.13, 0.12, 0.2), (0.24, 0.22, 0.6))
        turn, wall = rng.uniform(0.0, 180.0), rng.uniform(0.04, 0.08)
        inner = outer - wall
        where = (Tissue.VISCERAL, Tissue.BOWEL_WALL, Tissue.BOWEL_LUMEN)
        canvas.paint(Tissue.BOWEL_WALL, ellipsoid(centre, outer, turn), where)
        canvas.paint(Tissue.BOWEL_LUMEN, ellipsoid(centre, inner, turn), where)


def _liver(canvas: Canvas, rng: np.random.Generator) -> None:
    """Two lobes that overlap and taper downwards, on the right."""
    u, v, w = rng.uniform((0.36, -0.06, 0.15), (0.5, 0.1, 0.5))
    where = (Tissue.VISCERAL, Tissue.KIDNEY, Tissue.BOWEL_WALL, Tissue.BOWEL_LUMEN)
    right = rng.uniform((0.32, 0.38, 0.75), (0.42, 0.5, 1.1))
    canvas.paint(Tissue.LIVER, ellipsoid((u, v, w), right, rng.uniform(-25, 25), 2.3), where)
    left = rng.uniform((0.26, 0.13, 0.35), (0.44, 0.2, 0.7))
    centre = (u - rng.uniform(0.24, 0.36), v + rng.uniform(0.14, 0.26), w + 0.1)
    canvas.paint(Tissue.LIVER, ellipsoid(centre, left, rng.uniform(-30, 10)), where)
    spleen = rng.uniform((-0.72, -0.36, 0.1), (-0.6, -0.2, 0.5))
    size = rng.uniform((0.11, 0.18, 0.35), (0.17, 0.28, 0.7))
    canvas.paint(Tissue.SPLEEN, ellipsoid(spleen, size, rng.uniform(-35, -5)), where)


def _heart(canvas: Canvas, rng: np.random.Generator) -> None:
    """A cavity and its wall of uneven thickness; a second chamber leaves a crescent open."""
    centre = rng.uniform((-0.44, 0.08, 0.1), (-0.28, 0.26, 0.5))
    outer = rng.uniform((0.24, 0.23, 0.8), (0.34, 0.32, 1.2))
    thickness = rng.uniform(0.085, 0.13)
    turn = rng.uniform(-40.0, 40.0)
    lean = rng.uniform(-0.5, 0.5, 2) * thickness
    inner = np.append(outer[:2] - thickness, outer[2] - rng.uniform(0.12, 0.3))
    side = rng.uniform(100.0, 160.0)
    offset = outer[0] * np.array((np.cos(np.deg2rad(side)), -np.sin(np.deg2rad(side)), 0.0))
    chamber = centre - 0.95 * offset
    size = outer * rng.uniform(0.6, 0.85)
    canvas.paint(Tissue.BLOOD, ellipsoid(chamber, size, turn + 30.0))
    canvas.paint(Tissue.HEART_WALL, ellipsoid(centre, outer, turn))
    hollow = centre + np.append(lean, 0.0)
    canvas.paint(Tissue.BLOOD, ellipsoid(hollow, inner, turn))


def _vessels(canvas: Canvas, rng: np.random.Generator) -> None:
    """Artery left of and vein right of the spine; both wander, the artery tapers downwards."""
    for tissue, side, radius in ((Tissue.VEIN, 1.0, 0.11), (Tissue.ARTERY, -1.0, 0.11)):
        start = (side * rng.uniform(0.11, 0.18), rng.uniform(-0.2, -0.1))
        path = np.array([(*rng.uniform(-0.06, 0.06, 2), s) for s in start])
        size = np.array((rng.uniform(0.0, 0.03), radius * rng.uniform(0.85, 1.3)))
        canvas.paint(tissue, tube(path, size, rng.uniform(0.7, 1.1)))


def tissue_map(rng: np.random.Generator, coordinates: Coordinates) -> NDArray[np.uint8]:
    """Draw one subject's anatomy.

    Args:
      rng: source of the random numbers; the order of the draws is part of the result.
      coordinates: where the samples lie in the body.

    Returns:
      Tissue numbers, shape of the coordinates, as in `Tissue`.
    """
    canvas = Canvas(coordinates)
    _trunk(canvas, rng)
    canvas.confine()
    for part in (_bowel, _kidneys, _liver, _heart, _spine, _vessels):
        part(canvas, rng)
    return canvas.tissue
