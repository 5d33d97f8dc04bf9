"""What the teacher says of unlabelled clips.

Source: SSS (Zhu et al. 2026), figure 2; UniMatch V2 (Yang et al. 2024).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sss_jax import losses
from sss_jax.axes import Array, Bool, Float, Int
from sss_jax.options import Options
from sss_jax.parallel import Axis
from sss_jax.ssl.batches import cut, join
from sss_jax.ssl.network import Features, Network
from sss_jax.ssl.pcsw import clip_prompts
from sss_jax.ssl.prompts import ClipPrompts, clips_to_images, images_to_clips
from sss_jax.ssl.propagation import segment_clips
from sss_jax.ssl.self_sorting import Recall, segment_images
from sss_jax.ssl.views import UnlabelledViews, mix


class Target(NamedTuple):
    """What one strong view learns from; pixels of the view."""

    label_BSHW: Int[Array, "B S H W"]
    confidence_BSHW: Float[Array, "B S H W"]


class PseudoLabels(NamedTuple):
    """What the teacher says of the weak view; everything is under stop-gradient."""

    features: Features
    coarse_BSHWK: Float[Array, "B S h w K"]
    target: Target
    prompts_valid: Float[Array, ""]


def make_pseudo_labels(
    teacher: Network,
    views: UnlabelledViews,
    slice_mask_BS: Bool[Array, "B S"],
    options: Options,
    recall: Recall | None = None,
) -> PseudoLabels:
    """Segment the weak view with the teacher: coarse masks, PCSW prompts, then the decoder.

    Args:
        teacher: the teacher's network; it gets no gradient.
        views: views of the clips.
        slice_mask_BS: true slices.
        options: all settings.
        recall: the self-sorting bank; None where memories go from slice to slice, or nowhere.
    """
    teacher = Network(teacher.model, jax.lax.stop_gradient(teacher.net))
    _, slices, height, width = views.valid_BSHW.shape
    features = teacher.encode(clips_to_images(views.weak_BSHWC))
    coarse = images_to_clips(teacher.coarse_foreground(features), slices)
    prompts, prompts_valid = clip_prompts(coarse, slice_mask_BS, width, options.pcsw)
    size = (height, width)
    target = _decide(teacher, features, prompts, slice_mask_BS, size, options, recall)
    return jax.lax.stop_gradient(PseudoLabels(features, coarse, target, prompts_valid))


def _decide(
    teacher: Network,
    features: Features,
    prompts: ClipPrompts,
    slice_mask_BS: Array,
    size: tuple[int, int],
    options: Options,
    recall: Recall | None,
) -> Target:
    """Segment clips and take the most probable class of every pixel."""
    if recall is None:
        output = segment_clips(teacher, features, prompts, slice_mask_BS, options)
    else:
        output, _ = segment_images(teacher, features, prompts, recall)
    probability = jax.nn.softmax(losses.upsample_logits(output.logits_BHWK1, size))
    slices = slice_mask_BS.shape[1]
    return Target(
        images_to_clips(jnp.argmax(probability, axis=-1), slices),
        images_to_clips(jnp.max(probability, axis=-1), slices),
    )


def mix_target(box_B4: Float[Array, "B 4"], target: Target, axis: Axis | None) -> Target:
    """Paste what the teacher says where a strong view's image is pasted."""
    return Target(*(mix(box_B4, x, axis) for x in target))


def lifted_targets(
    teacher: Network,
    lifted: list[Features],
    prompts: list[ClipPrompts],
    slice_mask_BS: Array,
    views: UnlabelledViews,
    options: Options,
    recall: Recall | None = None,
) -> list[Target]:
    """Segment the weak view once for each strong view, with the features that DFE lifted.

    Args:
        teacher: the teacher's network.
        lifted: features of the weak view, pasted and lifted, for each strong view.
        prompts: prompts of each strong view.
        slice_mask_BS: true slices.
        views: views of the clips.
        options: all settings.
        recall: the self-sorting bank, for the images of all strong views together.
    """
    height, width = views.valid_BSHW.shape[2:]
    together = join([slice_mask_BS] * len(lifted))
    size = (height, width)
    target = _decide(teacher, join(lifted), join(prompts), together, size, options, recall)
    return cut(jax.lax.stop_gradient(target), [len(slice_mask_BS)] * len(lifted))
