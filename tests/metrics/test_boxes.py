"""Scores of box prompts against pixels that are counted one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sss_jax.metrics.boxes import box_iou, mean_box_scores, score_boxes, tight_box

SLICES, SIDE, CLASSES = 3, 5, 2
corners = st.tuples(*[st.integers(0, SIDE - 1)] * 4)
boxes = corners.map(lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3])))


def pixels(box):
    """Set of the (x, y) that a box holds."""
    x0, y0, x1, y1 = (int(c) for c in box)
    return {(x, y) for x in range(x0, x1 + 1) for y in range(y0, y1 + 1)}


def slow_iou(one, other):
    return len(pixels(one) & pixels(other)) / len(pixels(one) | pixels(other))


def slow_tight_box(mask):
    places = [(x, y) for y in range(len(mask)) for x in range(len(mask[0])) if mask[y][x]]
    if not places:
        return None
    xs, ys = zip(*places, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def slow_means(volumes):
    """Both means over (volume, class) pairs, as the module's conventions say, with loops alone."""
    found, real, ious = 0, 0, []
    for box, valid, label in volumes:
        for k in range(CLASSES):
            if not (label == k + 1).any():
                continue
            real += 1
            own = []
            for s in range(SLICES):
                if valid[s, k]:
                    truth = slow_tight_box((label[s] == k + 1).tolist())
                    own.append(0.0 if truth is None else slow_iou(box[s, k], truth))
            if own:
                found += 1
                ious.append(sum(own) / len(own))
    means = {"prompts_found": found / real} if real else {}
    return means | ({"prompt_iou": sum(ious) / len(ious)} if ious else {})


volumes = st.tuples(
    st.lists(boxes, min_size=SLICES * CLASSES, max_size=SLICES * CLASSES).map(
        lambda b: np.array(b, np.float32).reshape(SLICES, CLASSES, 4)
    ),
    hnp.arrays(np.bool_, (SLICES, CLASSES)),
    hnp.arrays(np.uint8, (SLICES, SIDE, SIDE), elements=st.sampled_from((0, 0, 0, 0, 1, 2))),
)


@settings(deadline=None)
@given(boxes, boxes)
def test_iou_counts_pixels(one, other):
    got = box_iou(np.array(one, np.float32), np.array(other, np.float32))
    assert got == pytest.approx(slow_iou(one, other))


@settings(deadline=None)
@given(hnp.arrays(np.bool_, (4, 7)))
def test_tight_box_touches_the_mask_on_all_sides(mask):
    got, want = tight_box(mask), slow_tight_box(mask.tolist())
    assert (None if got is None else tuple(got)) == want


@settings(max_examples=150, deadline=None)
@given(st.lists(volumes, max_size=3))
def test_means_equal_counting(drawn):
    got = mean_box_scores([score_boxes(*volume) for volume in drawn])
    assert got == pytest.approx(slow_means(drawn))


def test_by_hand():
    label = np.zeros((3, 8, 8), np.uint8)
    label[0, 2:4, 1:5] = 1  # 4 x 2 pixels from (1, 2) to (4, 3)
    box, valid = np.zeros((3, 2, 4)), np.zeros((3, 2), bool)

    missed = score_boxes(box, valid, label)
    assert (missed.real_K.tolist(), missed.found_K.tolist()) == ([True, False], [False, False])
    assert mean_box_scores([missed]) == {"prompts_found": 0.0}

    box[0, 0], valid[0, 0] = (0, 0, 4, 3), True  # 5 x 4 pixels around them
    assert score_boxes(box, valid, label).iou_K[0] == pytest.approx(8 / 20)

    valid[1, 0] = True  # a second prompt, where the object is not
    assert score_boxes(box, valid, label).iou_K[0] == pytest.approx(4 / 20)

    valid[2, 1] = True  # the second class is nowhere, so its prompt counts nowhere
    scores = score_boxes(box, valid, label)
    assert np.isnan(scores.iou_K[1])
    both = mean_box_scores([missed, scores])
    assert both == pytest.approx({"prompts_found": 0.5, "prompt_iou": 0.2})


def test_nothing_to_score_gives_no_numbers():
    assert mean_box_scores([]) == {}
    empty = score_boxes(np.zeros((1, 2, 4)), np.ones((1, 2), bool), np.zeros((1, 4, 4), np.uint8))
    assert mean_box_scores([empty]) == {}
