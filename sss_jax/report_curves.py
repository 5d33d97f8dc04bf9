"""The curves of a report: losses, validation, pseudo-labels, speed and whatever else was logged."""

import math
import re
from collections.abc import Sequence
from typing import Any

from sss_jax.report_data import RunFolder
from sss_jax.report_svg import Series, line_chart

_LOSSES = {
    "loss": "total",
    "loss_labelled": "labelled",
    "loss_unlabelled": "unlabelled",
    "loss_coarse": "coarse head",
    "loss_iou": "predicted IoU",
    "loss_presence": "object presence",
}
_SHARES = {
    "coverage": "confident pixels",
    "prompts_valid": "valid prompts",
    "pseudo_accuracy": "accuracy",
    "pseudo_dice": "Dice of pseudo-labels",
}
_SINGLE = {
    "rate": ("Learning rate", "rate"),
    "grad_norm": ("Gradient norm", "norm before clipping"),
    "slices_per_s": ("Throughput", "slices per second"),
    "data_wait": ("Waiting for data", "share of time"),
}
_PLACED = {"step", "kind", *_LOSSES, *_SHARES, *_SINGLE}


def curves(folder: RunFolder) -> str:
    """Return charts of everything the log holds; what has no place of its own comes last."""
    names = {f"dice_{k}": name for k, name in enumerate(folder.class_names, start=1)}
    validation = collect(folder.val, {"dice": "mean", **names})
    charts = [
        line_chart("Validation Dice", "Dice", validation, (0.0, 1.0)),
        line_chart("Losses", "loss", collect(folder.train, _LOSSES), from_zero=True),
        line_chart("Pseudo-labels", "share", collect(folder.train, _SHARES), (0.0, 1.0)),
    ]
    for name, (title, unit) in _SINGLE.items():
        series = collect(folder.train, {name: "last"})
        charts.append(line_chart(title, unit, series, from_zero=True))
    for stem, keys in _rest(folder.train).items():
        series = collect(folder.train, {k: k if len(keys) > 1 else "last" for k in keys})
        charts.append(line_chart(stem, "value", series))
    return "".join(charts)


def _rest(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Group other quantities by name: those that differ in a final number share a chart."""
    groups: dict[str, list[str]] = {}
    for key in dict.fromkeys(k for row in rows for k in row if k not in _PLACED):
        groups.setdefault(re.sub(r"_\d+$", "", key), []).append(key)
    return groups


def collect(rows: Sequence[dict[str, Any]], names: dict[str, str]) -> list[Series]:
    """Return a line for each quantity that the rows have.

    Args:
        rows: rows of the log.
        names: what to draw and how to call it; the first takes the colour of text, so that
            classes keep theirs.
    """
    result = []
    for number, (key, name) in enumerate(names.items()):
        points = [
            (float(r["step"]), float(r[key]))
            for r in rows
            if isinstance(r.get(key), int | float) and not isinstance(r.get(key), bool)
        ]
        if any(math.isfinite(y) for _, y in points):
            result.append(Series(name, sorted(points, key=lambda p: p[0]), number))
    return result
