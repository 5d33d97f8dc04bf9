"""Slices that travelled as they are stored, brought to the network's square on the device.

A slice of 256 pixels is a sixteenth of one of 1024, so sending it unresized saves that much of the
way to the device, and the host's largest piece of work. The numbers are those of `data.resize`.
"""

import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Float, Int
from sss_jax.data.resize import LEAD
from sss_jax.options import Options

__all__ = ["fit", "resize_weights"]


def fit(clips: dict[str, Array], options: Options) -> dict[str, Array]:
    """Resize clips that lie on a canvas; clips of another form are returned as they are.

    Args:
        clips: a stream of the batch; with `placement`, image [B, S, c, c, 1] and, where there are
            labels, label [B, S, c, c] are native slices at the top left of the canvas.
        options: size of the square and number of classes.

    Returns:
        The stream with image [B, S, H, W, 1] and label [B, S, H, W] of the square, equal to what
        `data.examples.place` makes of the same slices but for rounding.
    """
    if "placement" not in clips:
        return clips
    size, canvas = options.model.image_size, clips["image"].shape[2]
    rows, columns = (
        jax.vmap(lambda line: resize_weights(line, size, canvas))(lines)
        for lines in jnp.split(clips["placement"], 2, axis=1)
    )
    image = jnp.clip(_resize(clips["image"][..., 0], rows, columns), 0.0, 1.0)
    fitted = {name: x for name, x in clips.items() if name != "placement"}
    fitted["image"] = image[..., None]
    if "label" in clips:
        classes = options.model.num_classes
        fitted["label"] = _largest_share(clips["label"], rows, columns, classes)
    return fitted


def resize_weights(line_3: Int[Array, " 3"], size: int, canvas: int) -> Float[Array, "H c"]:
    """Return the weights of a linear, antialiased resize with padding.

    Distances are counted in whole numbers, in shares of a pixel, so that float32 rounds once.

    Args:
        line_3: pixels in, pixels out, and pixels of padding before these.
        size: pixels in all.
        canvas: pixels that came in, of which the first ones count.
    """
    source, target, before = line_3
    at_H1 = (jnp.arange(size) - before)[:, None]
    pixel_1c = jnp.arange(canvas)[None, :]
    # Centres lie at (at + 1/2) source / target - 1/2; times 2 target all of this is whole.
    gap_Hc = jnp.abs(2 * target * pixel_1c - (2 * at_H1 + 1) * source + target)
    weight_Hc = jnp.maximum(2 * jnp.maximum(source, target) - gap_Hc, 0)
    known_Hc = (at_H1 >= 0) & (at_H1 < target) & (pixel_1c < source)
    weight_Hc = jnp.where(known_Hc, weight_Hc, 0)
    return weight_Hc / jnp.maximum(jnp.sum(weight_Hc, 1, keepdims=True), 1)


def _resize(
    x_BSrc: Float[Array, "B S r c"], rows_BHr: Float[Array, "B H r"], columns_BWc: Array
) -> Float[Array, "B S H W"]:
    # Reduced precision of accelerators would shift intensities and decide ties.
    exact = jax.lax.Precision.HIGHEST
    x_BSHc = jnp.einsum("bhr,bsrc->bshc", rows_BHr, x_BSrc, precision=exact)
    return jnp.einsum("bshc,bwc->bshw", x_BSHc, columns_BWc, precision=exact)


def _largest_share(
    label_BSrc: Int[Array, "B S r c"], rows_BHr: Array, columns_BWc: Array, classes: int
) -> Int[Array, "B S H W"]:
    """Resize labels by the largest share of their resized planes, one class after the other."""

    def add(
        seen: tuple[Array, Array, Array], label: Array
    ) -> tuple[tuple[Array, Array, Array], None]:
        leader, best, background = seen
        share = _resize((label_BSrc == label).astype(jnp.float32), rows_BHr, columns_BWc)
        wins = share > best + LEAD
        now = jnp.where(wins, label, leader), jnp.where(wins, share, best), background - share
        return now, None

    shape = (*label_BSrc.shape[:2], rows_BHr.shape[1], columns_BWc.shape[1])
    start = jnp.zeros(shape, label_BSrc.dtype), jnp.zeros(shape), jnp.ones(shape)
    labels = jnp.arange(1, classes + 1, dtype=label_BSrc.dtype)
    (leader, best, background), _ = jax.lax.scan(add, start, labels)
    return jnp.where(background >= best - LEAD, 0, leader)
