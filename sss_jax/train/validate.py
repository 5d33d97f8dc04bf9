"""Validation on whole volumes, on their own grid."""

from collections.abc import Callable, Iterable

import jax.numpy as jnp
import numpy as np

from sss_jax.axes import PyTree
from sss_jax.data.cases import Case
from sss_jax.data.examples import Scan, place, restore_confident
from sss_jax.data.geometry import from_slices
from sss_jax.data.load import Read, load_scan
from sss_jax.errors import DataError
from sss_jax.metrics.boxes import mean_box_scores, score_boxes
from sss_jax.metrics.overlap import Counts, class_counts, dice
from sss_jax.options import Options
from sss_jax.ssl.volume import VolumeFunction, predict_volume


def validate(
    function: VolumeFunction,
    params: PyTree,
    cases: Iterable[Case],
    options: Options,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    read: Read = load_scan,
) -> dict[str, float] | None:
    """Return the mean Dice over cases: `dice` over all classes and `dice_k` of each.

    A class that is absent from reference and prediction of a case is not counted there. Training
    with unlabelled cases adds how good the pseudo-labels of this network would be, on cases whose
    truth is known: of the voxels that it calls foreground with confidence `semi.confidence`, the
    share that is right (`pseudo_precision`); of the true foreground, the share that it finds so
    (`pseudo_recall`). With PCSW come the classes that are in a volume and got a prompt
    (`prompts_found`, a share) and how well its box fits (`prompt_iou`), by the conventions of
    `sss_jax.metrics.boxes`. `read` gives the slices of a case. None if `should_stop` said so on
    the way.
    """
    scores, sure, boxes = [], [], []
    for case in cases:
        if should_stop():
            return None
        scan = read(case, options.model.num_classes, options.data).read()
        example = place(scan, options.model.image_size, options.data)
        output = predict_volume(function, params, example, options)
        probability, box_SK4, prompted_SK = map(np.asarray, output)
        reference = _reference(case, scan)
        predicted, confident = restore_confident(
            probability, example.placement, options.semi.confidence
        )
        scores.append(dice(_counts(predicted, reference, options)))
        if options.semi.enabled:
            sure.append(_counts(confident, reference, options))
        if options.pcsw.enabled:
            assert example.label_SHW is not None
            boxes.append(score_boxes(box_SK4, prompted_SK, example.label_SHW))
    return _mean_dice(np.array(scores)) | _pseudo_quality(sure) | mean_box_scores(boxes)


def _reference(case: Case, scan: Scan) -> np.ndarray:
    """Return a case's reference labels on its own grid."""
    if scan.label_SHW is None:
        raise DataError(f"{case.name} is a validation case and has no labels; add its label file")
    return from_slices(scan.label_SHW, scan.frame)


def _counts(predicted: np.ndarray, reference: np.ndarray, options: Options) -> Counts:
    return class_counts(jnp.asarray(predicted), jnp.asarray(reference), options.model.num_classes)


def _mean_dice(table_NK: np.ndarray) -> dict[str, float]:
    counted = ~np.isnan(table_NK)
    total = np.where(counted, table_NK, 0.0).sum(axis=0)
    per_class = np.where(counted.any(axis=0), total / np.maximum(counted.sum(axis=0), 1), np.nan)
    named = {f"dice_{k + 1}": float(value) for k, value in enumerate(per_class)}
    return {"dice": float(np.nanmean(per_class)), **named}


def _pseudo_quality(counts: list[Counts]) -> dict[str, float]:
    """Pool the foreground of all cases and classes; 0 where nothing is called foreground."""
    if not counts:
        return {}
    found, called, real = (
        sum(float(np.sum(part)) for part in parts) for parts in zip(*counts, strict=True)
    )
    return {
        "pseudo_precision": found / max(called, 1.0),
        "pseudo_recall": found / max(real, 1.0),
    }
