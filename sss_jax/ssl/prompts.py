"""Prompts of the mask decoder: a box and its centre for each image and class."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Bool, Float, Int, Key
from sss_jax.models.prompt_encoder import (
    BOX_END,
    BOX_START,
    CLICK,
    PADDING,
    MaskPrompts,
    Prompts,
    no_prompts,
)


class ClipPrompts(NamedTuple):
    """Prompts of K classes in B clips of S slices.

    Attributes:
        points_BSKQ2: (x, y) in pixels of the input image.
        labels_BSKQ: kinds of the points, -1 where there is none, as in `Prompts`.
        start_BK: slice from which the class is carried through the clip.
        mask_BSKHW: mask prompts (logits) at four times the coarse grid; None: no clip has any.
        mask_given_BSK: which of them exist.
    """

    points_BSKQ2: Float[Array, "B S K Q 2"]
    labels_BSKQ: Int[Array, "B S K Q"]
    start_BK: Int[Array, "B K"]
    mask_BSKHW: Float[Array, "B S K H W"] | None = None
    mask_given_BSK: Bool[Array, "B S K"] | None = None

    def images(self) -> Prompts:
        """Prompts of the B x S images."""
        return Prompts(clips_to_images(self.points_BSKQ2), clips_to_images(self.labels_BSKQ))

    def boxes(self) -> tuple[Float[Array, "B S K 4"], Bool[Array, "B S K"]]:
        """Inclusive corners (x0, y0, x1, y1) of box prompts by `to_prompts`, and which exist."""
        corners_BSK22 = self.points_BSKQ2[..., :2, :]
        box_BSK4 = corners_BSK22.reshape(*corners_BSK22.shape[:-2], 4)
        return box_BSK4, self.labels_BSKQ[..., 0] == BOX_START

    def image_masks(self) -> MaskPrompts | None:
        """Mask prompts of the B x S images."""
        if self.mask_BSKHW is None or self.mask_given_BSK is None:
            return None
        return MaskPrompts(clips_to_images(self.mask_BSKHW), clips_to_images(self.mask_given_BSK))

    def without_masks(self, grid: tuple[int, int]) -> "ClipPrompts":
        """Say that no class has a mask prompt, beside clips that have some."""
        shape = self.labels_BSKQ.shape[:3]
        return self._replace(
            mask_BSKHW=jnp.zeros((*shape, *grid)), mask_given_BSK=jnp.zeros(shape, bool)
        )


def no_clip_prompts(slice_mask_BS: Bool[Array, "B S"], classes: int) -> ClipPrompts:
    """No class has a prompt; each is carried outwards from the middle slice."""
    batch, slices = slice_mask_BS.shape
    none = no_prompts(batch * slices, classes)
    middle_BK = jnp.broadcast_to(middle_slice(slice_mask_BS)[:, None], (batch, classes))
    return of_clips(none, slices, middle_BK)


def of_clips(images: Prompts, slices: int, start_BK: Int[Array, "B K"]) -> ClipPrompts:
    """Lay the prompts of B x S images out by clips."""
    points, labels = (images_to_clips(x, slices) for x in images)
    return ClipPrompts(points, labels, start_BK)


def middle_slice(slice_mask_BS: Bool[Array, "B S"]) -> Int[Array, " B"]:
    """Middle of the true slices."""
    return jnp.sum(slice_mask_BS, axis=1, dtype=jnp.int32) // 2


def to_prompts(
    box_BK4: Float[Array, "B K 4"],
    point_BK2: Float[Array, "B K 2"],
    valid_BK: Bool[Array, "B K"],
) -> Prompts:
    """Lay out boxes and points as prompt points.

    Args:
        box_BK4: inclusive corners (x0, y0, x1, y1), pixels of the input image.
        point_BK2: (x, y), pixels of the input image.
        valid_BK: false where the class gets neither box nor point; its coordinates become 0.
    """
    points_BKQ2 = jnp.stack([box_BK4[..., :2], box_BK4[..., 2:], point_BK2], axis=-2)
    points_BKQ2 = jnp.where(valid_BK[..., None, None], points_BKQ2, 0.0)
    labels_BKQ = jnp.where(
        valid_BK[..., None],
        jnp.array([BOX_START, BOX_END, CLICK], jnp.int32)[None, None],
        PADDING,
    )
    return Prompts(points_BKQ2, labels_BKQ)


def select(condition_BK: Bool[Array, "B K"], one: ClipPrompts, other: ClipPrompts) -> ClipPrompts:
    """Take each clip's and class's prompts from `one` where the condition holds, else `other`."""
    condition_BSK = condition_BK[:, None]
    return ClipPrompts(
        jnp.where(condition_BSK[..., None, None], one.points_BSKQ2, other.points_BSKQ2),
        jnp.where(condition_BSK[..., None], one.labels_BSKQ, other.labels_BSKQ),
        jnp.where(condition_BK, one.start_BK, other.start_BK),
    )


def clips_to_images(array_BS: Array) -> Array:
    """Flatten clips and slices into images: [B, S, ...] to [B * S, ...]."""
    return array_BS.reshape(-1, *array_BS.shape[2:])


def images_to_clips(array_B: Array, slices: int) -> Array:
    """Undo `clips_to_images`: [B * S, ...] to [B, S, ...]."""
    return array_B.reshape(-1, slices, *array_B.shape[1:])


def box_centre(box_4: Float[Array, "*B 4"]) -> Float[Array, "*B 2"]:
    """Centre (x, y) of boxes with inclusive corners."""
    return (box_4[..., :2] + box_4[..., 2:]) / 2


def full_box(height: int, width: int) -> Float[Array, " 4"]:
    """Box with inclusive corners that covers the whole image."""
    return jnp.array([0, 0, width - 1, height - 1], jnp.float32)


def _extent(line_N: Bool[Array, "*B N"]) -> tuple[Array, Array]:
    """First and last true position along the last axis."""
    first = jnp.argmax(line_N, axis=-1)
    last = line_N.shape[-1] - 1 - jnp.argmax(line_N[..., ::-1], axis=-1)
    return first.astype(jnp.float32), last.astype(jnp.float32)


def tight_box(
    mask_HW: Bool[Array, "*B H W"],
) -> tuple[Float[Array, "*B 4"], Bool[Array, "*B"]]:
    """Tight box of each mask's foreground.

    Args:
        mask_HW: foreground; any leading axes.

    Returns:
        Inclusive corners (x0, y0, x1, y1) in pixels of the mask, and whether there is any
        foreground; without any the box covers the whole mask.
    """
    x0, x1 = _extent(jnp.any(mask_HW, axis=-2))
    y0, y1 = _extent(jnp.any(mask_HW, axis=-1))
    return jnp.stack([x0, y0, x1, y1], axis=-1), jnp.any(mask_HW, axis=(-2, -1))


def jitter(
    key: Key[Array, ""], box_4: Float[Array, "*B 4"], spread: float, image_size: int
) -> tuple[Float[Array, "*B 4"], Float[Array, "*B 2"]]:
    """Move every side of each box by normal noise, as an annotator or a detector would miss it.

    Use one key per example (`jax.vmap`), so that the noise does not depend on the batch.

    Args:
        key: random key of the example.
        box_4: inclusive corners (x0, y0, x1, y1), pixels.
        spread: standard deviation of the noise, share of the side's length.
        image_size: side of the square image, pixels; boxes are clipped to it.

    Returns:
        The moved boxes, with ordered corners and thus at least one pixel, and their centres.
    """
    low, high = box_4[..., :2], box_4[..., 2:]
    side = high - low + 1
    noise = jax.random.normal(key, box_4.shape, box_4.dtype) * spread
    moved = box_4 + noise * jnp.concatenate([side, side], axis=-1)
    moved = jnp.clip(moved, 0, image_size - 1)
    one, other = moved[..., :2], moved[..., 2:]
    box = jnp.concatenate([jnp.minimum(one, other), jnp.maximum(one, other)], axis=-1)
    return box, box_centre(box)
