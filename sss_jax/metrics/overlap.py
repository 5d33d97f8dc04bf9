"""Overlap metrics on the device, from counts that add up over slices, volumes and devices."""

from typing import NamedTuple

import jax.numpy as jnp

from sss_jax.axes import Array, Bool, Float, Int

__all__ = ["Counts", "class_counts", "dice", "jaccard"]


class Counts(NamedTuple):
    """Voxels per foreground class; add the fields of two of them to pool their regions."""

    intersection: Int[Array, "... K"]
    prediction: Int[Array, "... K"]
    reference: Int[Array, "... K"]


def class_counts(
    prediction: Int[Array, "..."],
    reference: Int[Array, "..."],
    num_classes: int,
    valid: Bool[Array, "..."] | None = None,
) -> Counts:
    """Count the voxels of one region (an image, a volume, a batch) per foreground class.

    Args:
        prediction: labels 0..K of any shape.
        reference: labels of the same shape.
        num_classes: K.
        valid: voxels that count; None: all do.

    Returns:
        Counts over the whole region, exact up to 2^31 voxels; `jax.vmap` keeps axes apart.
    """
    per_class = []
    # One class at a time: a one-hot volume would need K times its memory.
    for k in range(1, num_classes + 1):
        guess, truth = prediction == k, reference == k
        if valid is not None:
            guess, truth = guess & valid, truth & valid
        per_class.append([jnp.sum(m, dtype=jnp.int32) for m in (guess & truth, guess, truth)])
    return Counts(*(jnp.stack(column) for column in zip(*per_class, strict=True)))


def _ratio(part: Int[Array, "... K"], whole: Int[Array, "... K"]) -> Float[Array, "... K"]:
    part, whole = part.astype(jnp.float32), whole.astype(jnp.float32)
    return jnp.where(whole > 0, part / jnp.maximum(whole, 1.0), jnp.nan)


def dice(counts: Counts) -> Float[Array, "... K"]:
    """Dice per class; NaN (not counted) where prediction and reference are both empty."""
    whole = counts.prediction.astype(jnp.float32) + counts.reference.astype(jnp.float32)
    return _ratio(2 * counts.intersection.astype(jnp.float32), whole)


def jaccard(counts: Counts) -> Float[Array, "... K"]:
    """Jaccard index per class; NaN (not counted) where both are empty."""
    return _ratio(counts.intersection, counts.prediction - counts.intersection + counts.reference)
