"""Losses of the labelled and of the unlabelled branch.

All are computed in float32 and are ratios of sums over the global batch. Under `pmap` and
`shard_map` the sums go through `parallel.psum` one by one, because the mean of per-device ratios
is another number wherever devices differ in what they count; see `sss_jax.parallel` for what that
means for gradients. Pixels that are not valid neither count nor pass a gradient, whatever their
logits are.

Axes: N images (clips x slices), H W pixels, L = K + 1 classes with the background first.
"""

import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Bool, Float, Int
from sss_jax.options import LossOptions
from sss_jax.parallel import Axis, psum

__all__ = [
    "confident_share",
    "cross_entropy",
    "dice_loss",
    "iou_loss",
    "presence_loss",
    "supervised_loss",
    "unlabelled_loss",
    "upsample_logits",
]


def upsample_logits(
    logits_NhwC: Float[Array, "N h w C"], size: tuple[int, int]
) -> Float[Array, "N H W C"]:
    """Interpolate logits bilinearly, in float32, to the resolution of the labels.

    Args:
        logits_NhwC: logits on a coarser raster.
        size: rows and columns of the result, none below those of the input.

    Returns:
        Logits at `size`; pixel areas of both rasters cover the same square (half-pixel centres).
    """
    count, height, width, channels = logits_NhwC.shape
    if size[0] < height or size[1] < width:
        raise ValueError(f"logits of {height} x {width} pixels cannot be upsampled to {size}")
    shape = (count, *size, channels)
    return jax.image.resize(logits_NhwC.astype(jnp.float32), shape, "bilinear")


def _clean(
    logits_NHWL: Float[Array, "N H W L"], valid_NHW: Bool[Array, "N H W"]
) -> Float[Array, "N H W L"]:
    """Cast to float32 and take invalid pixels out: 0 times a non-finite gradient is NaN."""
    return jnp.where(valid_NHW[..., None], logits_NHWL.astype(jnp.float32), 0.0)


def _pixel_cross_entropy(
    clean_NHWL: Float[Array, "N H W L"], label_NHW: Int[Array, "N H W"]
) -> Float[Array, "N H W"]:
    """Negative log-probability of each pixel's label."""
    hit_NHWL = jax.nn.one_hot(label_NHW, clean_NHWL.shape[-1], dtype=bool)
    # Shifting first keeps both terms small: no overflow, no cancellation between large numbers.
    top_NHW1 = jax.lax.stop_gradient(jnp.max(clean_NHWL, -1, keepdims=True))
    shifted_NHWL = clean_NHWL - top_NHW1
    chosen_NHW = jnp.sum(jnp.where(hit_NHWL, shifted_NHWL, 0.0), -1)
    return jnp.log(jnp.sum(jnp.exp(shifted_NHWL), -1)) - chosen_NHW


def _ratio(
    numerator: Float[Array, ""], count: Float[Array, ""], axis: Axis | None
) -> Float[Array, ""]:
    """Global sum over global count; exactly 0 where nothing counts."""
    return psum(numerator, axis) / jnp.maximum(psum(count, axis), 1.0)


def _count(mask: Bool[Array, "..."]) -> Float[Array, ""]:
    # Integers first: float32 stops counting at 2 ** 24.
    return jnp.sum(mask, dtype=jnp.int32).astype(jnp.float32)


def cross_entropy(
    logits_NHWL: Float[Array, "N H W L"],
    label_NHW: Int[Array, "N H W"],
    valid_NHW: Bool[Array, "N H W"],
    axis: Axis | None = None,
) -> Float[Array, ""]:
    """Mean cross-entropy over the valid pixels of the global batch.

    Args:
        logits_NHWL: logits of background and classes.
        label_NHW: labels 0..K.
        valid_NHW: pixels that count.
        axis: device axis, or None.

    Returns:
        The mean, in nats; 0 if no pixel is valid.
    """
    pixel_NHW = _pixel_cross_entropy(_clean(logits_NHWL, valid_NHW), label_NHW)
    return _ratio(jnp.sum(jnp.where(valid_NHW, pixel_NHW, 0.0)), _count(valid_NHW), axis)


def dice_loss(
    logits_NHWL: Float[Array, "N H W L"],
    label_NHW: Int[Array, "N H W"],
    valid_NHW: Bool[Array, "N H W"],
    smooth: float,
    axis: Axis | None = None,
) -> Float[Array, ""]:
    """Soft Dice loss over the global batch, mean over the classes it is about.

    Per foreground class `1 - (2 sum(p y) + smooth) / (sum(p^2) + sum(y) + smooth)` over all valid
    pixels, p the softmax probability. A class counts if it is labelled at or predicted for (has
    the largest logit at) any valid pixel.

    Args:
        logits_NHWL: logits of background and classes.
        label_NHW: labels 0..K.
        valid_NHW: pixels that count.
        smooth: added to both sides of the ratio.
        axis: device axis, or None.

    Returns:
        A number in [0, 1]; 0 with zero gradient if no class counts.

    Source: V-Net (Milletari et al. 2016), as in UniMatch's medical recipe.
    Differs from the paper: classes neither labelled nor predicted are left out of the mean, where
    their ratio would be smooth / smooth.
    """
    clean_NHWL = _clean(logits_NHWL, valid_NHW)
    classes = clean_NHWL.shape[-1]
    valid_NHW1 = valid_NHW[..., None]
    truth_NHWK = (jax.nn.one_hot(label_NHW, classes, dtype=bool) & valid_NHW1)[..., 1:]
    guess_NHW = jnp.argmax(clean_NHWL, -1)
    guess_NHWK = (jax.nn.one_hot(guess_NHW, classes, dtype=bool) & valid_NHW1)[..., 1:]
    share_NHWK = jnp.where(valid_NHW1, jax.nn.softmax(clean_NHWL, -1), 0.0)[..., 1:]
    every = (0, 1, 2)
    overlap_K, squares_K, truth_K, any_K = psum(
        (
            jnp.sum(share_NHWK, every, where=truth_NHWK),
            jnp.sum(jnp.square(share_NHWK), every),
            jnp.sum(truth_NHWK, every, dtype=jnp.float32),
            jnp.any(truth_NHWK | guess_NHWK, every).astype(jnp.float32),
        ),
        axis,
    )
    counts_K = any_K > 0
    size_K = jnp.where(counts_K, squares_K + truth_K + smooth, 1.0)
    loss_K = jnp.where(counts_K, 1 - (2 * overlap_K + smooth) / size_K, 0.0)
    return jnp.sum(loss_K) / jnp.maximum(jnp.sum(counts_K, dtype=jnp.float32), 1.0)


@jax.named_scope("losses")
def supervised_loss(
    logits_NHWL: Float[Array, "N H W L"],
    label_NHW: Int[Array, "N H W"],
    valid_NHW: Bool[Array, "N H W"],
    options: LossOptions,
    axis: Axis | None = None,
) -> Float[Array, ""]:
    """Weighted sum of cross-entropy and soft Dice.

    Args:
        logits_NHWL: logits of background and classes.
        label_NHW: labels 0..K.
        valid_NHW: pixels that count.
        options: weights and smoothing.
        axis: device axis, or None.

    Returns:
        The loss of one head; the coarse head's weight is the caller's.
    """
    entropy = cross_entropy(logits_NHWL, label_NHW, valid_NHW, axis)
    dice = dice_loss(logits_NHWL, label_NHW, valid_NHW, options.smooth, axis)
    return options.cross_entropy * entropy + options.dice * dice


@jax.named_scope("losses")
def unlabelled_loss(
    logits_NHWL: Float[Array, "N H W L"],
    pseudo_label_NHW: Int[Array, "N H W"],
    confidence_NHW: Float[Array, "N H W"],
    valid_NHW: Bool[Array, "N H W"],
    tau: float,
    *,
    dice: bool,
    smooth: float,
    axis: Axis | None = None,
) -> Float[Array, ""]:
    """Consistency loss of one strong view against the pseudo-label.

    Cross-entropy summed over the confident valid pixels and divided by the number of all valid
    ones, so that its weight grows with the share of confident pixels.

    Args:
        logits_NHWL: logits of the strong view.
        pseudo_label_NHW: labels 0..K made from the weak view.
        confidence_NHW: largest probability of the weak view.
        valid_NHW: pixels that count.
        tau: confidence a pixel needs.
        dice: add the soft Dice loss on the confident pixels.
        smooth: smoothing of the Dice ratio.
        axis: device axis, or None.

    Returns:
        The loss; 0 with zero gradient if no pixel is confident.

    Source: UniMatch V2 (Yang et al. 2024); Dice as in UniMatch's medical recipe.
    """
    trusted_NHW = valid_NHW & (confidence_NHW >= tau)
    pixel_NHW = _pixel_cross_entropy(_clean(logits_NHWL, trusted_NHW), pseudo_label_NHW)
    loss = _ratio(jnp.sum(jnp.where(trusted_NHW, pixel_NHW, 0.0)), _count(valid_NHW), axis)
    if dice:
        loss += dice_loss(logits_NHWL, pseudo_label_NHW, trusted_NHW, smooth, axis)
    return loss


def confident_share(
    confidence_NHW: Float[Array, "N H W"],
    valid_NHW: Bool[Array, "N H W"],
    tau: float,
    axis: Axis | None = None,
) -> Float[Array, ""]:
    """Share of the valid pixels whose pseudo-label is used; 0 if no pixel is valid."""
    return _ratio(_count(valid_NHW & (confidence_NHW >= tau)), _count(valid_NHW), axis)


@jax.named_scope("losses")
def iou_loss(
    predicted_NK: Float[Array, "N K"],
    logits_NHWL: Float[Array, "N H W L"],
    label_NHW: Int[Array, "N H W"],
    valid_NHW: Bool[Array, "N H W"],
    axis: Axis | None = None,
) -> Float[Array, ""]:
    """L1 distance between the predicted and the true IoU of each class's mask.

    A class's mask is where its logit is the largest. Where a class is neither labelled nor
    predicted in an image its mask is right, so its true IoU is 1. The masks get no gradient.

    Args:
        predicted_NK: the decoder's estimate.
        logits_NHWL: logits of background and classes.
        label_NHW: labels 0..K.
        valid_NHW: pixels that count; an image without any does not count.
        axis: device axis, or None.

    Returns:
        Mean over classes and counted images; 0 if there is none.

    Source: SAM 2 (Ravi et al. 2024), which also uses L1 for the IoU head.
    """
    classes = logits_NHWL.shape[-1]
    valid_NHW1 = valid_NHW[..., None]
    guess_NHW = jnp.argmax(jax.lax.stop_gradient(logits_NHWL), -1)
    guess_NHWK = (jax.nn.one_hot(guess_NHW, classes, dtype=bool) & valid_NHW1)[..., 1:]
    truth_NHWK = (jax.nn.one_hot(label_NHW, classes, dtype=bool) & valid_NHW1)[..., 1:]
    both_NK = jnp.sum(guess_NHWK & truth_NHWK, (1, 2), dtype=jnp.float32)
    either_NK = jnp.sum(guess_NHWK | truth_NHWK, (1, 2), dtype=jnp.float32)
    true_NK = jnp.where(either_NK > 0, both_NK / jnp.maximum(either_NK, 1.0), 1.0)
    counted_N1 = jnp.any(valid_NHW, (1, 2))[:, None]
    predicted_NK = jnp.where(counted_N1, predicted_NK.astype(jnp.float32), true_NK)
    count = _count(counted_N1) * predicted_NK.shape[1]
    return _ratio(jnp.sum(jnp.abs(predicted_NK - true_NK)), count, axis)


@jax.named_scope("losses")
def presence_loss(
    score_NK: Float[Array, "N K"],
    label_NHW: Int[Array, "N H W"],
    valid_NHW: Bool[Array, "N H W"],
    axis: Axis | None = None,
) -> Float[Array, ""]:
    """Binary cross-entropy of the object score: is the class in this image?

    Args:
        score_NK: the decoder's score, a logit.
        label_NHW: labels 0..K.
        valid_NHW: pixels that count; an image without any does not count.
        axis: device axis, or None.

    Returns:
        Mean over classes and counted images, in nats; 0 if there is none.

    Source: SAM 2 (Ravi et al. 2024), the occlusion head.
    """
    classes = score_NK.shape[1]
    truth_NHWL = jax.nn.one_hot(label_NHW, classes + 1, dtype=bool) & valid_NHW[..., None]
    present_NK = jnp.any(truth_NHWL[..., 1:], (1, 2))
    counted_N1 = jnp.any(valid_NHW, (1, 2))[:, None]
    score_NK = jnp.where(counted_N1, score_NK.astype(jnp.float32), 0.0)
    # -log sigmoid(x) = softplus(-x), which neither overflows nor rounds to log(0).
    loss_NK = jax.nn.softplus(jnp.where(present_NK, -score_NK, score_NK))
    total = jnp.sum(jnp.where(counted_N1, loss_NK, 0.0))
    return _ratio(total, _count(counted_N1) * classes, axis)
