"""The curves of a report: losses, validation, pseudo-labels, speed and whatever else was logged."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

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


class _Insight(NamedTuple):
    """A chart that says why the unlabelled images help, or why they do not."""

    title: str
    unit: str
    names: dict[str, str]
    bounds: tuple[float, float]
    about: str


_INSIGHTS = (
    _Insight(
        "Pseudo-labels in use",
        "share of pixels",
        {"coverage": "confident", "coverage_foreground": "confident foreground"},
        (0.0, 1.0),
        "Pixels of unlabelled images whose pseudo-label is sure enough to learn from: near 0 the "
        "images teach nothing, and without foreground they teach the background alone.",
    ),
    _Insight(
        "Pseudo-labels against the truth",
        "share of voxels",
        {"pseudo_precision": "right (precision)", "pseudo_recall": "found (recall)"},
        (0.0, 1.0),
        "On validation cases, of what is called foreground with confidence the share that is "
        "right, and of the true foreground the share that is found so: where the first falls, "
        "training repeats its own mistakes.",
    ),
    _Insight(
        "PCSW prompts",
        "share, IoU",
        {
            "prompts_valid": "classes with a prompt (unlabelled clips)",
            "prompts_found": "true objects with a prompt (validation)",
            "prompt_iou": "IoU of box and true object (validation)",
        },
        (0.0, 1.0),
        "Higher is better: without a prompt the decoder must find the object by its class alone, "
        "and a prompt with a low IoU points it at the wrong place.",
    ),
    _Insight(
        "DFE similarity",
        "cosine",
        {
            "similarity_level_4": "finest level",
            "similarity_level_8": "middle level",
            "similarity_level_16": "coarsest level",
        },
        (-1.0, 1.0),
        "How alike two views of an image are to DFE at each feature level: at 1 "
        "it adds nothing of their difference, and the lower, the more of it.",
    ),
)
_SINGLE = {
    "rate": ("Learning rate", "rate"),
    "grad_norm": ("Gradient norm", "norm before clipping"),
    "slices_per_s": ("Throughput", "slices per second"),
    "data_wait": ("Waiting for data", "share of time"),
}
_PLACED = {
    *("step", "kind", *_LOSSES, *_SINGLE),
    *(name for insight in _INSIGHTS for name in insight.names),
}


def curves(folder: RunFolder) -> str:
    """Return charts of everything the log holds; what has no place of its own comes last."""
    names = {f"dice_{k}": name for k, name in enumerate(folder.class_names, start=1)}
    validation = collect(folder.val, {"dice": "mean", **names})
    charts = [
        line_chart("Validation Dice", "Dice", validation, (0.0, 1.0)),
        line_chart("Losses", "loss", collect(folder.train, _LOSSES), from_zero=True),
        *_insights(folder),
    ]
    for name, (title, unit) in _SINGLE.items():
        series = collect(folder.train, {name: "last"})
        charts.append(line_chart(title, unit, series, from_zero=True))
    for stem, keys in _rest(folder.train).items():
        series = collect(folder.train, {k: k if len(keys) > 1 else "last" for k in keys})
        charts.append(line_chart(stem, "value", series))
    return "".join(charts)


def _insights(folder: RunFolder) -> list[str]:
    """Draw what is in the log; a chart may hold names of training and of validation rows."""
    rows = [*folder.train, *folder.val]
    return [
        line_chart(i.title, i.unit, collect(rows, i.names), i.bounds, about=i.about)
        for i in _INSIGHTS
    ]


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
