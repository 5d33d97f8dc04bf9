"""The losses of `sss_jax.losses` in plain torch, on one device.

Axes: N images, H W pixels, L = K + 1 classes with the background first.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from sss_jax.benchmarks.torch_network import Segmentation
from sss_jax.options import LossOptions


def supervised(logits: Tensor, label: Tensor, valid: Tensor, options: LossOptions) -> Tensor:
    """Cross-entropy and Dice of one head; its logits are upsampled to the labels."""
    logits = upsample(logits, label)
    entropy = F.cross_entropy(logits, label, reduction="none")
    mean = (entropy * valid).sum() / valid.sum().clamp(min=1)
    return options.cross_entropy * mean + options.dice * dice(logits, label, valid, options.smooth)


def unlabelled(
    logits: Tensor, label: Tensor, confidence: Tensor, valid: Tensor, tau: float, smooth: float
) -> Tensor:
    """Cross-entropy of the confident pixels over all valid ones, and Dice on the confident."""
    logits = upsample(logits, label)
    trusted = valid & (confidence >= tau)
    entropy = F.cross_entropy(logits, label, reduction="none")
    mean = (entropy * trusted).sum() / valid.sum().clamp(min=1)
    return mean + dice(logits, label, trusted, smooth)


def upsample(logits: Tensor, label: Tensor) -> Tensor:
    """Interpolate to the resolution of the labels."""
    return F.interpolate(logits, size=label.shape[-2:], mode="bilinear", align_corners=False)


def dice(logits: Tensor, label: Tensor, valid: Tensor, smooth: float) -> Tensor:
    """Soft Dice loss over the batch, mean over the classes that are labelled or predicted."""
    classes, valid_N1HW = logits.shape[1], valid[:, None]
    truth = _hot(label, classes) & valid_N1HW
    guess = _hot(logits.argmax(1), classes) & valid_N1HW
    share = logits.softmax(1) * valid_N1HW
    every = (0, 2, 3)
    overlap, squares = (share * truth).sum(every), share.square().sum(every)
    ratio = (2 * overlap + smooth) / (squares + truth.sum(every) + smooth)
    counts = (truth | guess).any(0).flatten(1).any(1)[1:]
    return ((1 - ratio)[1:] * counts).sum() / counts.sum().clamp(min=1)


def iou(output: Segmentation, label: Tensor, valid: Tensor) -> Tensor:
    """L1 distance of the estimated to the true IoU."""
    with torch.no_grad():
        logits = upsample(output.logits_NLHW, label)
        classes, valid_N1HW = logits.shape[1], valid[:, None]
        truth = (_hot(label, classes) & valid_N1HW)[:, 1:]
        guess = (_hot(logits.argmax(1), classes) & valid_N1HW)[:, 1:]
        both, either = ((op(truth, guess)).sum((2, 3)) for op in (torch.mul, torch.logical_or))
        true_NK = torch.where(either > 0, both / either.clamp(min=1), 1.0)
    return (output.iou_NK - true_NK).abs().mean()


def presence(output: Segmentation, label: Tensor, valid: Tensor) -> Tensor:
    """Binary cross-entropy of the object score."""
    hot = _hot(label, output.score_NK.shape[1] + 1) & valid[:, None]
    present_NK = hot[:, 1:].flatten(2).any(2).float()
    return F.binary_cross_entropy_with_logits(output.score_NK, present_NK)


def _hot(label: Tensor, classes: int) -> Tensor:
    return F.one_hot(label, classes).movedim(-1, 1).bool()
