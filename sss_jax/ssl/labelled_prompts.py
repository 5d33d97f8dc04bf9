"""Prompts of the labelled branch: the decoder should meet in training what it meets at test."""

import jax
import jax.numpy as jnp

from sss_jax.augment.keys import example_keys
from sss_jax.axes import Array, Float, Int, Key
from sss_jax.models.prompt_encoder import Prompts, no_prompts
from sss_jax.options import Options
from sss_jax.ssl.prompts import (
    clips_to_images,
    images_to_clips,
    jitter,
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
    return own + (truth if kind in ("mixed", "gt_box") else [])


def choose(
    key: Key[Array, ""],
    found: list[Prompts],
    id_B: Int[Array, " B"],
    slices: int,
    classes: int,
    options: Options,
) -> Prompts:
    """Draw the prompts of labelled clips, for B x S images.

    Args:
        key: key of the step.
        found: PCSW prompts of `volumes_to_search`.
        id_B: global ids of the clips.
        slices: S.
        classes: K.
        options: `semi.labelled_prompts`: `mixed` (per clip and class a jittered ground-truth box
            with probability 1/2, a PCSW prompt with 1/4, else none), `gt_box`, `pcsw` or `none`.

    Differs from the paper: the sources disagree (ground-truth mask in the published sketch, box or
    click in Medical-SAM2), and both make training easier than test; `mixed` is ours. A ground-truth
    box lies on the slices where PCSW would put one, given the true mask.
    """
    kind = options.semi.labelled_prompts
    none = no_prompts(id_B.shape[0] * slices, classes)
    if kind == "none":
        return none
    if kind == "pcsw":
        return found[0]
    key_box, key_choice = jax.random.split(key)
    truth = _jittered(example_keys(key_box, id_B), found[-1], slices, options)
    if kind == "gt_box":
        return truth
    keys = example_keys(key_choice, id_B)
    drawn_BK = jax.vmap(lambda k: jax.random.uniform(k, (classes,)))(keys)
    drawn_NK = jnp.repeat(drawn_BK, slices, axis=0)
    other = found[0] if options.pcsw.enabled else none
    return select(drawn_NK < _TRUTH, truth, select(drawn_NK < _TRUTH + _PCSW, other, none))


def _jittered(key_B: Key[Array, " B"], tight: Prompts, slices: int, options: Options) -> Prompts:
    corners_NK22 = tight.points_BKQ2[:, :, :2]
    box_BSK4 = images_to_clips(corners_NK22.reshape(*corners_NK22.shape[:2], 4), slices)
    moved, centre = jax.vmap(
        lambda k, box: jitter(k, box, options.semi.box_jitter, options.model.image_size)
    )(key_B, box_BSK4)
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
