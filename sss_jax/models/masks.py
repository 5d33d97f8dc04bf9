"""Masks after the decoder: holes, islands, and objects that must not overlap.

Pure functions of logits, for any number of objects, inside jit or outside.

Source: SAM 2 (Ravi et al. 2024) as published: holes by 8 neighbours, and non-overlapping objects.
"""

from typing import NamedTuple

import jax.numpy as jnp

from sss_jax.axes import Array, Bool, Float
from sss_jax.models.components import component_sizes, plane_components

SMALL = 0.1
"""Logit of a filled hole, and less its sign of a removed island: barely on the other side."""

SUPPRESSED = -10.0
"""Where another object scores higher a logit is at most this."""


class MaskRules(NamedTuple):
    """What is done to masks as the decoder gives them; static under jit.

    Attributes:
        clean_area: fill holes and remove islands of up to so many pixels of the mask's grid.
        overlap: objects may claim the same pixel.
    """

    clean_area: int = 0
    overlap: bool = True


AS_DECODED = MaskRules()


def clean_masks(logits_BKHW: Float[Array, "B K H W"], max_area: int) -> Float[Array, "B K H W"]:
    """Fill the holes of every mask, then remove its islands, of up to `max_area` pixels.

    Pixels that touch at a corner belong together, in masks as in holes. An island counts with the
    holes that were filled in it, so the result has neither holes nor islands that small. Pixels
    that do not change sides keep their logit.
    Differs from SAM 2, which fills holes only.

    Args:
        logits_BKHW: masks before the threshold 0.
        max_area: pixels of these masks; 0 changes nothing.
    """
    if max_area < 1:
        return logits_BKHW
    inside = logits_BKHW > 0
    filled = inside | _small(~inside, max_area)
    cleaned = filled & ~_small(filled, max_area)
    return jnp.where(cleaned == inside, logits_BKHW, jnp.where(cleaned, SMALL, -SMALL))


def _small(mask_BKHW: Bool[Array, "B K H W"], max_area: int) -> Bool[Array, "B K H W"]:
    """Which pixels belong to a component of at most `max_area` pixels."""
    mask_SHW = mask_BKHW.reshape(-1, *mask_BKHW.shape[2:])
    label_SHW = plane_components(mask_SHW, connectivity=26)  # in a plane: 8 neighbours
    area_SHW = component_sizes(label_SHW, mask_SHW)[label_SHW]
    return mask_BKHW & (area_SHW <= max_area).reshape(mask_BKHW.shape)


def separate_objects(logits_BKHW: Float[Array, "B K H W"]) -> Float[Array, "B K H W"]:
    """Leave every pixel to the object with the highest logit; the first one of equals.

    The others are pushed to `SUPPRESSED` there, unless they are below already.
    """
    best_B1HW = jnp.argmax(logits_BKHW, axis=1, keepdims=True)
    own = jnp.arange(logits_BKHW.shape[1])[None, :, None, None] == best_B1HW
    return jnp.where(own, logits_BKHW, jnp.minimum(logits_BKHW, SUPPRESSED))
