"""Prompts of the mask decoder: a box and its centre for each image and class."""

import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Bool, Float, Key
from sss_jax.models.prompt_encoder import BOX_END, BOX_START, CLICK, PADDING, Prompts


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


def select(condition_BK: Bool[Array, "B K"], one: Prompts, other: Prompts) -> Prompts:
    """Take each image's and class's prompt from `one` where the condition holds, else `other`."""
    return Prompts(
        jnp.where(condition_BK[..., None, None], one.points_BKQ2, other.points_BKQ2),
        jnp.where(condition_BK[..., None], one.labels_BKQ, other.labels_BKQ),
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
