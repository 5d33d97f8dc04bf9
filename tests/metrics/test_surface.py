"""HD95, ASD and NSD against pairwise distances, hand-computed figures and SimpleITK."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.distance import cdist

from sss_jax.metrics.surface import directed_distances, surface_scores, volume_diagonal

SHAPE = (5, 6, 4)
masks = hnp.arrays(np.bool_, SHAPE)
spacings = st.tuples(*[st.sampled_from((0.5, 0.7, 1.0, 3.3))] * 3)


def surface_points(mask, spacing):
    """Object voxels with an outside face neighbour, by looking at all six; in length units."""
    padded = np.pad(mask, 1)
    points = []
    for index in np.argwhere(mask):
        for axis in range(mask.ndim):
            for step in (-1, 1):
                neighbour = index + 1
                neighbour[axis] += step
                if not padded[tuple(neighbour)]:
                    points.append(tuple(index))
    return np.unique(np.array(points), axis=0) * np.array(spacing)


def pairwise(a, b, spacing):
    distances = cdist(surface_points(a, spacing), surface_points(b, spacing))
    return distances.min(axis=1), distances.min(axis=0)


@settings(max_examples=60, deadline=None)
@given(masks, masks, spacings, st.sampled_from((0.0, 0.7, 1.0, 2.0)))
def test_equals_pairwise_distances(a, b, spacing, tolerance):
    scores = surface_scores(a, b, spacing, tolerance)
    if not a.any() and not b.any():
        assert all(math.isnan(s) for s in scores)
    elif not a.any() or not b.any():
        assert scores == (*[volume_diagonal(SHAPE, spacing)] * 2, 0.0)
    else:
        pooled = np.concatenate(pairwise(a, b, spacing))
        assert scores.hd95 == pytest.approx(np.percentile(pooled, 95))
        assert scores.asd == pytest.approx(pooled.mean())
        assert scores.nsd == pytest.approx((pooled <= tolerance + 1e-7).mean())


@settings(max_examples=25, deadline=None)
@given(masks, masks, spacings)
def test_symmetric_and_bounded(a, b, spacing):
    forth, back = (surface_scores(x, y, spacing, 1.0) for x, y in ((a, b), (b, a)))
    np.testing.assert_allclose(forth, back, equal_nan=True)
    if a.any() or b.any():
        assert forth.hd95 <= volume_diagonal(SHAPE, spacing)
        assert 0.0 <= forth.nsd <= 1.0
    if a.any():
        assert surface_scores(a, a, spacing, 0.0) == (0.0, 0.0, 1.0)


@settings(max_examples=25, deadline=None)
@given(masks, masks, st.sampled_from((0.5, 2.0, 7.0)))
def test_distances_scale_with_the_spacing(a, b, factor):
    small = surface_scores(a, b, (1.0, 2.0, 3.0), 1.0)
    large = surface_scores(a, b, (factor, 2 * factor, 3 * factor), factor)
    np.testing.assert_allclose(large.hd95, factor * small.hd95, equal_nan=True)
    np.testing.assert_allclose(large.asd, factor * small.asd, equal_nan=True)
    np.testing.assert_allclose(large.nsd, small.nsd, equal_nan=True)


def test_two_single_voxels_by_hand():
    a, b = np.zeros((2, 9, 9, 9), bool)
    a[2, 2, 2], b[5, 6, 2] = True, True
    scores = surface_scores(a, b, (1.0, 1.0, 1.0), 4.9)
    assert scores == (5.0, 5.0, 0.0)
    assert surface_scores(a, b, (1.0, 1.0, 1.0), 5.0).nsd == 1.0
    assert surface_scores(a, b, (2.0, 0.5, 1.0), 1.0).hd95 == pytest.approx(math.hypot(6.0, 2.0))


def test_each_axis_uses_its_own_spacing():
    for axis in range(3):
        a, b = np.zeros((2, 4, 4, 4), bool)
        a[0, 0, 0] = True
        b[tuple(2 if i == axis else 0 for i in range(3))] = True
        assert surface_scores(a, b, (1.0, 10.0, 100.0), 0.0).hd95 == 2 * 10.0**axis


def test_inner_voxels_do_not_count_and_the_edge_of_the_volume_is_surface():
    a = np.ones((5, 5, 5), bool)
    b = a.copy()
    b[2, 2, 2] = False  # its six neighbours become surface voxels of b, one inside a's surface
    to_b, to_a = directed_distances(a, b, (1.0, 1.0, 1.0))
    assert to_b.size == 5**3 - 3**3
    assert to_a.size == to_b.size + 6
    np.testing.assert_allclose(np.sort(to_a)[-6:], 1.0)
    assert np.all(to_b == 0)


def test_pooling_weighs_each_surface_voxel_once():
    # Object of one voxel against a line of nine: the mean of directed means would be 1.0.
    a, b = np.zeros((2, 9, 1, 1), bool)
    a[4], b[:] = True, True
    scores = surface_scores(a, b, (1.0, 1.0, 1.0), 0.0)
    assert scores.asd == pytest.approx((0 + 2 * (1 + 2 + 3 + 4)) / 10)
    assert scores.nsd == pytest.approx(2 / 10)
    assert scores.hd95 == pytest.approx(4.0)


def test_a_tolerance_equal_to_the_spacing_forgives_one_voxel():
    for step in (0.1, 0.3, 0.7, 1.1):
        a, b = np.zeros((2, 8, 1, 1), bool)
        a[2], b[3] = True, True
        assert surface_scores(a, b, (step, 1.0, 1.0), step).nsd == 1.0


def test_position_in_the_volume_does_not_matter():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 6, 5, 4)) < 0.4
    wide = [np.pad(m, ((7, 2), (1, 9), (4, 4))) for m in (a, b)]
    inner = [np.pad(m, 1) for m in (a, b)]
    assert surface_scores(*wide, (1.0, 2.0, 0.5), 1.0) == surface_scores(
        *inner, (1.0, 2.0, 0.5), 1.0
    )


def test_agrees_with_simpleitk_hausdorff():
    sitk = pytest.importorskip("SimpleITK")
    rng = np.random.default_rng(1)
    grid = np.stack(np.meshgrid(*map(np.arange, (30, 26, 14)), indexing="ij"))
    spacing = (0.8, 1.3, 4.0)
    for _ in range(3):
        balls = []
        for _ in range(2):
            centre, radius = rng.uniform((10, 10, 5), (18, 15, 8)), rng.uniform(5, 8)
            offset = (grid - centre[:, None, None, None]) * np.array((1, 1, 2))[:, None, None, None]
            balls.append((offset**2).sum(axis=0) < radius**2)
        images = []
        for ball in balls:
            image = sitk.GetImageFromArray(ball.astype(np.uint8).transpose(2, 1, 0))
            image.SetSpacing(spacing)
            images.append(image)
        oracle = sitk.HausdorffDistanceImageFilter()
        oracle.Execute(*images)
        # SimpleITK measures from all voxels of one object to the other object; for these convex
        # objects the farthest voxel lies on the surface, so the maximum is the same.
        ours = np.concatenate(directed_distances(*balls, spacing)).max()
        assert ours == pytest.approx(oracle.GetHausdorffDistance(), rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "spacing", "tolerance"),
    [((3, 3, 3), (1.0, 1.0), 1.0), ((3, 3, 3), (1.0, 0.0, 1.0), 1.0), ((3, 3, 3), (1.0,) * 3, -1)],
)
def test_refuses_nonsense(shape, spacing, tolerance):
    mask = np.ones(shape, bool)
    with pytest.raises(ValueError, match=r"must|match"):
        surface_scores(mask, mask, spacing, tolerance)
