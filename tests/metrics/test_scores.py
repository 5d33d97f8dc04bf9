"""Rows of a case and their summary: the four empty/non-empty pairs and hand-computed figures."""

import json
import math

import numpy as np
import pytest

from sss_jax.metrics.scores import Row, score_case, summarise
from sss_jax.metrics.surface import volume_diagonal


def volume(*boxes, shape=(6, 6, 4)):
    array = np.zeros(shape, np.uint8)
    for label, index in boxes:
        array[index] = label
    return array


EMPTY = volume()
BLOCK = volume((1, np.s_[1:3, 1:3, 1:3]))
SPACING = (1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("prediction", "reference", "status", "dice"),
    [
        (EMPTY, EMPTY, "absent", math.nan),
        (EMPTY, BLOCK, "missed", 0.0),
        (BLOCK, EMPTY, "spurious", 0.0),
        (BLOCK, BLOCK, "found", 1.0),
    ],
)
def test_four_pairs_of_empty_and_full(prediction, reference, status, dice):
    (row,) = score_case(prediction, reference, SPACING, 1, 1.0, "a")
    assert row.status == status
    np.testing.assert_equal(row.dice, dice)
    np.testing.assert_equal(row.jaccard, dice)
    diagonal = volume_diagonal(EMPTY.shape, SPACING)
    distance = {"absent": math.nan, "found": 0.0}.get(status, diagonal)
    np.testing.assert_equal(row.hd95, distance)
    np.testing.assert_equal(row.asd, distance)
    np.testing.assert_equal(row.nsd, dice)
    assert diagonal == pytest.approx(math.sqrt(36 + 144 + 144))


def test_overlap_by_hand():
    moved = volume((1, np.s_[2:4, 1:3, 1:3]), (2, np.s_[0, 0, 0]))
    one, two = score_case(moved, BLOCK, SPACING, 2, 1.0, "a")
    assert (one.voxels_prediction, one.voxels_reference) == (8, 8)
    assert one.dice == pytest.approx(4 * 2 / 16)
    assert one.jaccard == pytest.approx(4 / 12)
    assert one.hd95 == 1.0
    assert (two.label, two.status, two.voxels_prediction) == (2, "spurious", 1)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shapes"):
        score_case(EMPTY, EMPTY[1:], SPACING, 1, 1.0)


def row(case, label, dice, status="found"):
    return Row(case, label, dice, dice / 2, 10 * dice, 5 * dice, dice, 1, 1, status)


def test_summary_by_hand():
    rows = [
        row("a", 1, 0.8),
        row("b", 1, 0.6),
        row("c", 1, 0.0, "missed"),
        row("a", 2, 0.5),
        row("b", 2, math.nan, "absent"),
        row("c", 2, 0.0, "spurious"),
    ]
    summary = summarise(rows, ["left", "right"])
    left, right = summary["classes"]
    assert (left["name"], left["label"], left["cases"], left["counted"]) == ("left", 1, 3, 3)
    assert (left["missed"], left["spurious"], left["absent"]) == (1, 0, 0)
    assert left["dice"]["mean"] == pytest.approx(1.4 / 3)
    assert left["dice"]["std"] == pytest.approx(np.std([0.8, 0.6, 0.0], ddof=1))
    assert (right["counted"], right["missed"], right["spurious"], right["absent"]) == (2, 0, 1, 1)
    assert right["dice"]["mean"] == pytest.approx(0.25)
    assert summary["mean"]["dice"] == pytest.approx((1.4 / 3 + 0.25) / 2)
    over_cases = summary["over_cases"]["dice"]  # case means 0.65, 0.6 and 0
    assert over_cases["mean"] == pytest.approx(1.25 / 3)
    assert over_cases["std"] == pytest.approx(np.std([0.65, 0.6, 0.0], ddof=1))
    assert summary["mean"]["hd95"] == pytest.approx(10 * (1.4 / 3 + 0.25) / 2)


def test_summary_of_an_absent_class_is_null_and_strict_json():
    rows = [row("a", 1, 0.5), row("a", 2, math.nan, "absent")]
    summary = summarise(rows, ["x", "y"])
    assert summary["classes"][1]["dice"] == {"mean": None, "std": None}
    assert summary["classes"][0]["dice"]["std"] is None  # one case has no spread
    assert summary["mean"]["dice"] == 0.5
    json.dumps(summary, allow_nan=False)
    nothing = summarise([row("a", 1, math.nan, "absent")], ["x"])
    assert nothing["mean"]["dice"] is None
