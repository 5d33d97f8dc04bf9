"""Prompts of the labelled branch: the decoder should meet in training what it meets at test."""

import jax
import jax.numpy as jnp

from sss_jax.augment.keys import example_keys
from sss_jax.axes import Array, Bool, Float, Int, Key
from sss_jax.options import Options
from sss_jax.ssl.pcsw import volume_prompts
from sss_jax.ssl.prompts import (
    Prompts,
    clips_to_images,
    images_to_clips,
    jitter,
    no_prompts,
    select,
    to_prompts,
)

# Shares of `mixed`: a jittered ground-truth box, a PCSW prompt; the rest has no prompt.
_TRUTH, _PCSW = 0.5, 0.25


def draw_prompts(
    key: Key[Array, ""],
    label_BSHW: Int[Array, "B S H W"],
    coarse_BSHWK: Float[Array, "B S h w K"],
    slice_mask_BS: Bool[Array, "B S"],
    id_B: Int[Array, " B"],
    options: Options,
) -> Prompts:
    """Draw the prompts of labelled clips, for B x S images.

    Args:
        key: key of the step.
        label_BSHW: labels of the weak view.
        coarse_BSHWK: foreground probabilities of the coarse head on the same view.
        slice_mask_BS: which slices are real.
        id_B: global ids of the clips.
        options: `semi.labelled_prompts` names the reading: `mixed` (per clip and class a jittered
            ground-truth box, a PCSW prompt or none), `gt_box`, `pcsw` or `none`.

    Differs from the paper: the sources disagree (ground-truth mask in the published sketch, box or
    click in Medical-SAM2), and both make training easier than test; `mixed` is ours. A ground-truth
    box lies on the slices where PCSW would put one, given the true mask.
    """
    batch, slices, _, _, classes = coarse_BSHWK.shape
    kind = options.semi.labelled_prompts
    none = no_prompts(batch * slices, classes)
    if kind == "none":
        return none
    stride = label_BSHW.shape[-1] // coarse_BSHWK.shape[-2]
    found = none
    if options.pcsw.enabled:
        coarse_BSHWK = jax.lax.stop_gradient(coarse_BSHWK)
        found, _ = volume_prompts(coarse_BSHWK, slice_mask_BS, stride, options.pcsw)
    if kind == "pcsw":
        return found
    key_box, key_choice = jax.random.split(key)
    truth = _truth_boxes(
        example_keys(key_box, id_B), label_BSHW, slice_mask_BS, stride, classes, options
    )
    if kind == "gt_box":
        return truth
    drawn_BK = jax.vmap(lambda k: jax.random.uniform(k, (classes,)))(example_keys(key_choice, id_B))
    drawn_NK = jnp.repeat(drawn_BK, slices, axis=0)
    return select(drawn_NK < _TRUTH, truth, select(drawn_NK < _TRUTH + _PCSW, found, none))


def _truth_boxes(
    key_B: Key[Array, " B"],
    label_BSHW: Array,
    slice_mask_BS: Array,
    stride: int,
    classes: int,
    options: Options,
) -> Prompts:
    slices, size = label_BSHW.shape[1], label_BSHW.shape[-1]
    mask = shrink_labels(label_BSHW, stride, classes)
    tight, _ = volume_prompts(mask, slice_mask_BS, stride, options.pcsw)
    box_NK4 = tight.points_BKQ2[:, :, :2].reshape(*tight.points_BKQ2.shape[:2], 4)
    moved, centre = jax.vmap(lambda k, box: jitter(k, box, options.semi.box_jitter, size))(
        key_B, images_to_clips(box_NK4, slices)
    )
    valid_NK = tight.labels_BKQ[..., 0] >= 0
    return to_prompts(clips_to_images(moved), clips_to_images(centre), valid_NK)


def shrink_labels(
    label_BSHW: Int[Array, "B S H W"], stride: int, classes: int
) -> Float[Array, "B S h w K"]:
    """Return the classes' masks on a coarser grid; a cell is on if any of its pixels is."""
    hot = jax.nn.one_hot(label_BSHW, classes + 1, dtype=jnp.float32)[..., 1:]
    batch, slices, height, width, _ = hot.shape
    cells = hot.reshape(batch, slices, height // stride, stride, width // stride, stride, classes)
    return cells.max(axis=(3, 5))
