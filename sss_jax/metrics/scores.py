"""Scores of segmented volumes: one row per case and class, and their summary over cases."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sss_jax.metrics.surface import surface_scores

METRICS = ("dice", "jaccard", "hd95", "asd", "nsd")
STATUSES = ("found", "missed", "spurious", "absent")


@dataclasses.dataclass(frozen=True)
class Row:
    """Scores of one class in one case.

    Attributes:
        case: name of the case.
        label: number of the class, from 1.
        dice: in [0, 1]; NaN if absent.
        jaccard: in [0, 1]; NaN if absent.
        hd95: 95th percentile of the surface distances, in the unit of the spacing.
        asd: mean surface distance, in the unit of the spacing.
        nsd: share of both surfaces within the tolerance.
        voxels_prediction: voxels of the class in the prediction.
        voxels_reference: voxels of the class in the reference.
        status: `found`: in both volumes; `missed`: in the reference alone; `spurious`: in the
            prediction alone; `absent`: in neither, which no mean counts.
    """

    case: str
    label: int
    dice: float
    jaccard: float
    hd95: float
    asd: float
    nsd: float
    voxels_prediction: int
    voxels_reference: int
    status: str


def score_case(
    prediction: NDArray[np.integer],
    reference: NDArray[np.integer],
    spacing: Sequence[float],
    num_classes: int,
    tolerance: float,
    case: str = "",
) -> list[Row]:
    """Score one volume for each class.

    Args:
        prediction: labels 0..K, [X, Y, Z].
        reference: labels 0..K of the same shape.
        spacing: distance of neighbouring voxels along each axis, mm (1 where unknown).
        num_classes: K.
        tolerance: distance that NSD forgives, in the unit of the spacing.
        case: name of the case.

    Returns:
        One row for each class 1..K, by the conventions of `sss_jax.metrics.surface`. If a class is
        in one volume alone, Dice and Jaccard are 0.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"{case}: shapes {prediction.shape} and {reference.shape} differ")
    return [
        _score_class(case, k, prediction == k, reference == k, spacing, tolerance)
        for k in range(1, num_classes + 1)
    ]


def absent_row(case: str, label: int) -> Row:
    """Return the row of a class that is in neither volume."""
    return Row(case, label, math.nan, math.nan, math.nan, math.nan, math.nan, 0, 0, "absent")


def _score_class(
    case: str,
    label: int,
    prediction: NDArray[np.bool_],
    reference: NDArray[np.bool_],
    spacing: Sequence[float],
    tolerance: float,
) -> Row:
    predicted, real = int(prediction.sum()), int(reference.sum())
    common, total = int((prediction & reference).sum()), predicted + real
    surface = surface_scores(prediction, reference, spacing, tolerance)
    return Row(
        case,
        label,
        2 * common / total if total else math.nan,
        common / (total - common) if total else math.nan,
        *surface,
        predicted,
        real,
        STATUSES[(0 if predicted else 1) + (0 if real else 2)],
    )


def usual_names(num_classes: int) -> list[str]:
    """Return names for the classes 1..K where nobody gave any."""
    return [f"class {k}" for k in range(1, num_classes + 1)]


def summarise(rows: Iterable[Row], class_names: Sequence[str]) -> dict[str, Any]:
    """Summarise rows: mean, standard deviation and counts per class, and means over classes.

    Args:
        rows: rows of all cases.
        class_names: name of each class 1..K.

    Returns:
        `classes`: for each class its `label`, `name`, number of `cases`, of cases `counted` in the
        means, `missed`, `spurious` and `absent`, and for each metric `mean` and `std` (over the
        counted cases; the sample's, n - 1). `mean`: for each metric the mean of the classes'
        means. `over_cases`: for each metric `mean` and `std` of the cases' means over their counted
        classes. None stands for a number that no case gives.
    """
    rows = list(rows)
    classes = [
        _class_summary(k, name, [r for r in rows if r.label == k])
        for k, name in enumerate(class_names, start=1)
    ]
    overall = {}
    for metric in METRICS:
        means = [c[metric]["mean"] for c in classes if c[metric]["mean"] is not None]
        overall[metric] = statistics.fmean(means) if means else None
    return {"classes": classes, "mean": overall, "over_cases": _over_cases(rows)}


def _over_cases(rows: list[Row]) -> dict[str, dict[str, float | None]]:
    by_case: dict[str, list[Row]] = {}
    for row in rows:
        if row.status != "absent":
            by_case.setdefault(row.case, []).append(row)
    return {
        metric: _spread([statistics.fmean(getattr(r, metric) for r in c) for c in by_case.values()])
        for metric in METRICS
    }


def _class_summary(label: int, name: str, rows: list[Row]) -> dict[str, Any]:
    counted = [row for row in rows if row.status != "absent"]
    summary: dict[str, Any] = {
        "label": label,
        "name": name,
        "cases": len(rows),
        "counted": len(counted),
        **{s: sum(row.status == s for row in rows) for s in STATUSES[1:]},
    }
    return summary | {m: _spread([getattr(row, m) for row in counted]) for m in METRICS}


def _spread(values: list[float]) -> dict[str, float | None]:
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }
