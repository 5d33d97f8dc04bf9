"""PCSW for the torch side: masks go to the host, scipy searches them, prompts come back.

Needs torch. Axes: B clips, S slices, K classes, h w the mask grid, Q prompt points.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sss_jax.benchmarks.pcsw_cost import with_scipy
from sss_jax.benchmarks.torch_network import Prompts
from sss_jax.models.prompt_encoder import BOX_END, BOX_START, CLICK, PADDING


def search(mask_BSKhw: Tensor, stride: int, spread: float | None = None) -> Prompts:
    """Make one prompt per clip and class, on the slice that the search chooses.

    Args:
        mask_BSKhw: foreground of each class, on any device.
        stride: input pixels per mask pixel.
        spread: standard deviation by which each side of a box is moved, share of its length, and
            the point with it to the centre; None: neither is moved.

    Returns:
        Prompts of the B x S images; a class has none on any other slice, nor without foreground.
    """
    masks = mask_BSKhw.cpu().numpy()
    batch, slices, classes = masks.shape[:3]
    points = np.zeros((batch, slices, classes, 3, 2), np.float32)
    labels = np.full((batch, slices, classes, 3), PADDING, np.int64)
    for b in range(batch):
        for k in range(classes):
            volume = masks[b, :, k]
            if not volume.any():
                continue
            at, box, point = find(volume)
            box, point = _in_pixels(box, point, stride)
            if spread is not None:
                box, point = _jittered(box, spread, stride * masks.shape[-1])
            points[b, at, k] = [box[:2], box[2:], point]
            labels[b, at, k] = [BOX_START, BOX_END, CLICK]
    flat = (torch.from_numpy(x).flatten(0, 1).to(mask_BSKhw.device) for x in (points, labels))
    return Prompts(*flat)


def find(volume_Shw: NDArray[np.bool_]) -> tuple[int, NDArray, NDArray]:
    """Prompt slice, inclusive box and point of a volume with foreground, in mask pixels."""
    at, accepted, corners = with_scipy(volume_Shw)
    box = np.array(corners, np.float32)
    if accepted:
        return at, box, (box[:2] + box[2:]) / 2
    y, x = np.nonzero(volume_Shw[at])
    return at, box, np.array([x.mean(), y.mean()], np.float32)


def shrink(label_BSHW: Tensor, stride: int, classes: int) -> Tensor:
    """Masks [B, S, K, h, w] of the classes; a cell is on if any of its pixels is."""
    hot = F.one_hot(label_BSHW, classes + 1).movedim(-1, 2)[:, :, 1:].float()
    return F.max_pool2d(hot.flatten(0, 1), stride).unflatten(0, hot.shape[:2]) > 0


def _in_pixels(box: NDArray, point: NDArray, stride: int) -> tuple[NDArray, NDArray]:
    last = np.array([0, 0, stride - 1, stride - 1], np.float32)
    return box * stride + last, point * stride + (stride - 1) / 2


def _jittered(box: NDArray, spread: float, size: int) -> tuple[NDArray, NDArray]:
    side = np.tile(box[2:] - box[:2] + 1, 2)
    moved = np.clip(box + spread * side * np.random.default_rng().standard_normal(4), 0, size - 1)
    low, high = np.minimum(moved[:2], moved[2:]), np.maximum(moved[:2], moved[2:])
    return np.concatenate([low, high]), (low + high) / 2
