"""How well the box prompts of a volume fit the objects they stand for, where the truth is known.

Conventions, stated once:

- A box holds whole pixels: inclusive corners (x0, y0, x1, y1), so one pixel has an area of 1.
- A prompt is compared with the tight box of all true pixels of its class on its slice. It scores 0
  where the class is not on that slice.
- A class that is nowhere in the volume is not counted, whether it got a prompt or not.
- PCSW finds its boxes on the coarse masks, so their sides are whole coarse pixels (four of the
  input, two in `nano`): even the box of a perfect mask reaches IoU 1 only where the object's sides
  lie on them.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer


class BoxScores(NamedTuple):
    """Scores of the box prompts of one volume.

    Attributes:
        iou_K: mean IoU over the class's prompts; NaN where it has none or is not in the volume.
        found_K: whether a class that is in the volume has a prompt.
        real_K: whether the class is in the volume.
    """

    iou_K: Float[np.ndarray, " K"]
    found_K: Bool[np.ndarray, " K"]
    real_K: Bool[np.ndarray, " K"]


def tight_box(mask_HW: Bool[np.ndarray, "H W"]) -> Float[np.ndarray, " 4"] | None:
    """Return the smallest box (x0, y0, x1, y1) around a mask, in pixels; None if it is empty."""
    rows, columns = (np.flatnonzero(mask_HW.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return None
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float64)


def box_iou(one_4: Float[np.ndarray, " 4"], other_4: Float[np.ndarray, " 4"]) -> float:
    """Return intersection over union of two boxes (x0, y0, x1, y1) with inclusive corners."""
    low, high = np.maximum(one_4[:2], other_4[:2]), np.minimum(one_4[2:], other_4[2:])
    common = _area(low, high)
    return common / (_area(one_4[:2], one_4[2:]) + _area(other_4[:2], other_4[2:]) - common)


def score_boxes(
    box_SK4: Float[np.ndarray, "S K 4"],
    valid_SK: Bool[np.ndarray, "S K"],
    label_SHW: Integer[np.ndarray, "S H W"],
) -> BoxScores:
    """Compare the box prompts of a volume with its labels.

    Args:
        box_SK4: inclusive corners (x0, y0, x1, y1), pixels of the label's grid.
        valid_SK: which slices carry a prompt of the class.
        label_SHW: labels 0..K.
    """
    classes = valid_SK.shape[1]
    real_K = np.bincount(label_SHW.ravel(), minlength=classes + 1)[1 : classes + 1] > 0
    found_K = real_K & valid_SK.any(axis=0)
    iou_K = np.full(classes, np.nan)
    for k in np.flatnonzero(found_K):
        ious = []
        for s in np.flatnonzero(valid_SK[:, k]):
            truth = tight_box(label_SHW[s] == k + 1)
            ious.append(0.0 if truth is None else box_iou(box_SK4[s, k], truth))
        iou_K[k] = np.mean(ious)
    return BoxScores(iou_K, found_K, real_K)


def mean_box_scores(volumes: Iterable[BoxScores]) -> dict[str, float]:
    """Average over all volumes and classes.

    Returns:
        `prompts_found`: of the classes that are in a volume, the share with a prompt;
        `prompt_iou`: mean IoU of those that have one. A share or mean of nothing is left out.
    """
    volumes = list(volumes)
    if not volumes:
        return {}
    iou, found, real = (np.concatenate(parts) for parts in zip(*volumes, strict=True))
    scores = {"prompts_found": float(found[real].mean())} if real.any() else {}
    return scores | ({"prompt_iou": float(iou[found].mean())} if found.any() else {})


def _area(low_2: np.ndarray, high_2: np.ndarray) -> float:
    """Count the pixels from one inclusive corner to the other; 0 where they cross."""
    return float(np.prod(np.maximum(high_2 - low_2 + 1, 0.0), dtype=np.float64))
