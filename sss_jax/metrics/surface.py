"""Surface distances between two binary volumes: HD95, ASD and NSD.

Conventions, stated once:

- The surface is the set of object voxels with a face neighbour outside the object or the volume.
- Distances run between voxel centres, exactly, in the unit of the spacing.
- Both directed sets are pooled: HD95 is their 95th percentile (linear between ranks), as medpy's
  `hd95` is; ASD is their mean, as `assd` of medpy 0.5.2 is. `assd` of medpy 0.4.0 is instead the
  mean of the two directed means, and medpy's `asd` one directed mean (prediction to reference);
  they differ from this ASD where the two surfaces differ in size.
- NSD (Nikolov et al. 2018) is the share of the pooled surface voxels within the tolerance. The
  original weighs surface elements by area; here each surface voxel counts once.
- Both volumes empty: NaN, to be left out of a mean and counted apart. One empty: HD95 and ASD are
  the diagonal of the volume, which no distance exceeds, and NSD is 0.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]


class SurfaceScores(NamedTuple):
    """Distances in the unit of the spacing; NSD in [0, 1]."""

    hd95: float
    asd: float
    nsd: float


def surface_scores(
    prediction: Mask, reference: Mask, spacing: Sequence[float], tolerance: float
) -> SurfaceScores:
    """Score the agreement of two surfaces, by the conventions of this module.

    Args:
        prediction: object voxels, 2-D or 3-D.
        reference: object voxels, of the same shape.
        spacing: distance of neighbouring voxels along each axis.
        tolerance: distance that NSD forgives, in the unit of the spacing.

    Returns:
        HD95, ASD and NSD; NaN where both volumes are empty.
    """
    if prediction.shape != reference.shape or len(spacing) != prediction.ndim:
        raise ValueError(f"{prediction.shape}, {reference.shape} and {spacing} do not match")
    if not all(math.isfinite(s) and s > 0 for s in spacing) or not tolerance >= 0:
        raise ValueError(f"spacing {spacing} and tolerance {tolerance} must be positive")
    if not prediction.any() and not reference.any():
        return SurfaceScores(math.nan, math.nan, math.nan)
    if not (prediction.any() and reference.any()):
        diagonal = volume_diagonal(prediction.shape, spacing)
        return SurfaceScores(diagonal, diagonal, 0.0)
    pooled = np.concatenate(directed_distances(prediction, reference, spacing))
    # The slack keeps a distance that equals the tolerance within it, whatever the rounding.
    within = pooled <= tolerance * (1.0 + 1e-9)
    return SurfaceScores(
        float(np.percentile(pooled, 95.0)), float(pooled.mean()), float(within.mean())
    )


def directed_distances(
    prediction: Mask, reference: Mask, spacing: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the distance of each surface voxel to the other surface, both directions.

    Args:
        prediction: object voxels, at least one.
        reference: object voxels of the same shape, at least one.
        spacing: distance of neighbouring voxels along each axis.

    Returns:
        Distances from the prediction's surface to the reference's, and back; one for each voxel.
    """
    box = ndimage.find_objects((prediction | reference).astype(np.uint8))[0]
    first, second = _surface(prediction[box]), _surface(reference[box])
    to_second = ndimage.distance_transform_edt(~second, sampling=spacing)[first]
    to_first = ndimage.distance_transform_edt(~first, sampling=spacing)[second]
    return to_second, to_first


def volume_diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Length of the diagonal of a volume, outer edge to outer edge, in the spacing's unit."""
    return math.hypot(*(n * s for n, s in zip(shape, spacing, strict=True)))


def _surface(mask: Mask) -> Mask:
    """Object voxels with a face neighbour outside; what lies beyond the array is outside."""
    return mask & ~ndimage.binary_erosion(mask, ndimage.generate_binary_structure(mask.ndim, 1))
