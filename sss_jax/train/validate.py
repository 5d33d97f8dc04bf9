"""Validation on whole volumes, on their own grid."""

from collections.abc import Callable, Iterable

import numpy as np

from sss_jax.axes import PyTree
from sss_jax.data.cases import Case
from sss_jax.data.load import load_example
from sss_jax.data.nifti import read_labels
from sss_jax.errors import DataError
from sss_jax.options import Options
from sss_jax.ssl.volume import VolumeFunction, predict_example


def validate(
    function: VolumeFunction,
    params: PyTree,
    cases: Iterable[Case],
    options: Options,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Return the mean Dice over cases: `dice` over all classes and `dice_k` of each.

    A class that is absent from reference and prediction of a case is not counted there. None if
    `should_stop` said so on the way.
    """
    rows = []
    for case in cases:
        if should_stop():
            return None
        example = load_example(case, options.model, options.data)
        predicted = predict_example(function, params, example, options)
        reference = read_reference(case, options)
        rows.append(volume_dice(predicted, reference, options.model.num_classes))
    table = np.array(rows)
    counted = ~np.isnan(table)
    per_class = np.where(
        counted.any(axis=0),
        np.nansum(table, axis=0) / np.maximum(counted.sum(axis=0), 1),
        np.nan,
    )
    named = {f"dice_{k + 1}": float(value) for k, value in enumerate(per_class)}
    return {"dice": float(np.nanmean(per_class)), **named}


def read_reference(case: Case, options: Options) -> np.ndarray:
    """Return a case's reference labels on its own grid."""
    if case.label is None:
        raise DataError(f"{case.name} is a validation case and has no labels; add its label file")
    return read_labels(case.label, options.model.num_classes, options.data.max_voxels).array


def volume_dice(predicted: np.ndarray, reference: np.ndarray, num_classes: int) -> list[float]:
    """Return the Dice of classes 1..K; NaN where a class is in neither volume."""
    scores = []
    for k in range(1, num_classes + 1):
        a, b = predicted == k, reference == k
        size = a.sum() + b.sum()
        scores.append(2.0 * np.logical_and(a, b).sum() / size if size else float("nan"))
    return scores
