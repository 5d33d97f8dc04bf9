"""Prompts of the labelled branch: the decoder should meet in training what it meets at test."""

import jax
import jax.numpy as jnp

from sss_jax.augment.keys import example_keys
from sss_jax.axes import Array, Float, Int, Key
from sss_jax.models.sam2 import MASK_PROMPT_LOGIT
from sss_jax.options import Options
from sss_jax.ssl.prompts import (
    ClipPrompts,
    clips_to_images,
    jitter,
    of_clips,
    select,
    to_prompts,
)

# Shares of `mixed`: a jittered ground-truth box, a PCSW prompt; the rest has no prompt.
_TRUTH, _PCSW = 0.5, 0.25


def volumes_to_search(
    label_BSHW: Int[Array, "B S H W"], coarse_BSHWK: Float[Array, "B S h w K"], options: Options
) -> list[Float[Array, "B S h w K"]]:
    """Return the foreground masks whose PCSW prompts `choose` needs, in its order.

    Args:
        label_BSHW: labels of the weak view.
        coarse_BSHWK: foreground probabilities of the coarse head on the same view.
        options: `semi.labelled_prompts` names the reading.
    """
    stride = label_BSHW.shape[-1] // coarse_BSHWK.shape[-2]
    kind = options.semi.labelled_prompts
    own = [coarse_BSHWK] if options.pcsw.enabled and kind in ("mixed", "pcsw") else []
    truth = [shrink_labels(label_BSHW, stride, coarse_BSHWK.shape[-1])]
    return own + (truth if kind in ("mixed", "gt_box", "gt_mask") else [])


def choose(
    key: Key[Array, ""],
    found: list[ClipPrompts],
    volumes: list[Float[Array, "B S h w K"]],
    id_B: Int[Array, " B"],
    none: ClipPrompts,
    options: Options,
) -> ClipPrompts:
    """Draw the prompts of labelled clips.

    Args:
        key: key of the step.
        found: PCSW prompts of `volumes`.
        volumes: what `volumes_to_search` returned.
        id_B: global ids of the clips.
        none: the absence of prompts.
        options: `semi.labelled_prompts`: `mixed` (per clip and class a jittered ground-truth box
            with probability 1/2, a PCSW prompt with 1/4, else none), `gt_box`, `gt_mask`, `pcsw` or
            `none`.

    Differs from the paper: the sources disagree (ground-truth mask in the published sketch, box or
    click in Medical-SAM2), and both make training easier than test; `mixed` is ours. A ground-truth
    box or mask lies on the slices where PCSW would put a box, given the true mask.
    """
    kind = options.semi.labelled_prompts
    if kind == "none":
        return none
    if kind == "pcsw":
        return found[0]
    if kind == "gt_mask":
        return _as_masks(found[-1], volumes[-1], none)
    key_box, key_choice = jax.random.split(key)
    truth = _jittered(example_keys(key_box, id_B), found[-1], options)
    if kind == "gt_box":
        return truth
    keys = example_keys(key_choice, id_B)
    drawn_BK = jax.vmap(lambda k: jax.random.uniform(k, none.start_BK.shape[1:]))(keys)
    other = found[0] if options.pcsw.enabled else none
    return select(drawn_BK < _TRUTH, truth, select(drawn_BK < _TRUTH + _PCSW, other, none))


def _as_masks(
    tight: ClipPrompts, truth_BSHWK: Float[Array, "B S h w K"], none: ClipPrompts
) -> ClipPrompts:
    """Put masks in place of boxes."""
    logits = (2 * jnp.moveaxis(truth_BSHWK, -1, 2) - 1) * MASK_PROMPT_LOGIT
    given_BSK = tight.labels_BSKQ[..., 0] >= 0
    return none._replace(start_BK=tight.start_BK, mask_BSKHW=logits, mask_given_BSK=given_BSK)


def _jittered(key_B: Key[Array, " B"], tight: ClipPrompts, options: Options) -> ClipPrompts:
    corners = tight.points_BSKQ2[:, :, :, :2]
    slices = corners.shape[1]
    moved, centre = jax.vmap(
        lambda k, box: jitter(k, box, options.semi.box_jitter, options.model.image_size)
    )(key_B, corners.reshape(*corners.shape[:3], 4))
    valid_NK = clips_to_images(tight.labels_BSKQ[..., 0] >= 0)
    flat = to_prompts(clips_to_images(moved), clips_to_images(centre), valid_NK)
    return of_clips(flat, slices, tight.start_BK)


def shrink_labels(
    label_BSHW: Int[Array, "B S H W"], stride: int, classes: int
) -> Float[Array, "B S h w K"]:
    """Return the classes' masks on a coarser grid; a cell is on if any of its pixels is."""
    sides = (1, 1, 1, stride, stride)
    hot_KBSHW = label_BSHW[None] == jnp.arange(1, classes + 1).reshape(-1, 1, 1, 1, 1)
    cells = jax.lax.reduce_window(
        hot_KBSHW.astype(jnp.float32), 0.0, jax.lax.max, sides, sides, "VALID"
    )
    return jnp.moveaxis(cells, 0, -1)
