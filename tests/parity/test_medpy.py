"""Dice, Jaccard, HD95 and ASD against medpy, which most papers of the field report by.

medpy is no dependency. To run this file, in an environment that has this package:

    pip install --no-deps medpy
    python -m pytest tests/parity/test_medpy.py
"""

import nibabel as nib
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from sss_jax.metrics.scores import score_case

pytest.importorskip("medpy", reason="medpy is not installed; this file says how")

from medpy.metric import binary

TOLERANCE = 1e-6
CLASSES = 3


def assert_equal_scores(prediction, reference, spacing, classes=CLASSES):
    """Compare every class that is in both volumes; return how many those were."""
    compared = 0
    for row in score_case(prediction, reference, spacing, classes, tolerance=1.0):
        ours, theirs = prediction == row.label, reference == row.label
        if not (ours.any() and theirs.any()):
            assert row.status != "found"
            continue
        compared += 1
        assert row.dice == pytest.approx(binary.dc(ours, theirs), abs=TOLERANCE)
        assert row.jaccard == pytest.approx(binary.jc(ours, theirs), abs=TOLERANCE)
        hd95 = binary.hd95(ours, theirs, voxelspacing=spacing)
        assert row.hd95 == pytest.approx(hd95, abs=TOLERANCE)
        assert row.asd == pytest.approx(pooled_mean(ours, theirs, spacing), abs=TOLERANCE)
    return compared


def pooled_mean(one, other, spacing):
    """Our ASD, of medpy's distances: it has no name for the mean over both surfaces together."""
    distances = getattr(binary, "__surface_distances")
    both = distances(one, other, spacing), distances(other, one, spacing)
    return np.concatenate(both).mean()


@settings(max_examples=80, deadline=None)
@given(
    *[hnp.arrays(np.uint8, (5, 6, 4), elements=st.integers(0, CLASSES))] * 2,
    st.tuples(*[st.sampled_from((0.5, 0.7, 1.0, 3.3))] * 3),
)
def test_any_labels(prediction, reference, spacing):
    assume(assert_equal_scores(prediction, reference, spacing))


def blobs(seed):
    """Smooth objects of three classes, as large as organs are beside their volume."""
    rng = np.random.default_rng(seed)
    shape = rng.integers(20, 40, 3)
    noise = ndimage.gaussian_filter(rng.standard_normal((CLASSES + 1, *shape)), (0, 4, 4, 2))
    noise[0] *= 1.5
    return rng, np.argmax(noise, axis=0).astype(np.uint8)


@pytest.mark.parametrize("seed", range(4))
def test_smooth_objects(seed):
    rng, reference = blobs(seed)
    moved = np.roll(reference, tuple(rng.integers(-3, 4, 3)), axis=(0, 1, 2))
    noisy = np.where(rng.random(reference.shape) < 0.05, 0, moved).astype(np.uint8)
    spacing = tuple(rng.uniform(0.5, 8.0, 3))
    for prediction in (moved, noisy, blobs(seed + 10)[1]):
        smaller = tuple(slice(min(n)) for n in zip(prediction.shape, reference.shape, strict=True))
        assert assert_equal_scores(prediction[smaller], reference[smaller], spacing) == CLASSES


def test_which_of_medpys_means_the_asd_is():
    """As documented: not the one-sided `asd`, nor the mean of two means, as `assd` once was."""
    one, line = np.zeros((2, 9, 1, 1), np.uint8)
    one[4], line[:] = 1, 1
    (row,) = score_case(one, line, (1.0, 1.0, 1.0), 1, tolerance=0.0)
    assert row.asd == pytest.approx(2.0)
    sides = binary.asd(one, line), binary.asd(line, one)
    assert sides == pytest.approx((0.0, 20 / 9))
    assert binary.assd(one, line) in (pytest.approx(row.asd), pytest.approx(np.mean(sides)))


def disagreeing(reference):
    """What a network may get wrong: a shift, a thinner object, a lost slice."""
    yield np.roll(reference, (2, -1, 0), axis=(0, 1, 2))
    inside = ndimage.binary_erosion(reference > 0, ndimage.generate_binary_structure(3, 1))
    yield np.where(inside, reference, 0).astype(np.uint8)
    cut = reference.copy()
    cut[..., np.flatnonzero(reference.any(axis=(0, 1)))[-1]] = 0
    yield cut


@pytest.mark.parametrize("spacing", [None, (1.4, 1.7, 8.0)], ids=["own", "typical"])
def test_real_labels(real_data, spacing):
    """ACDC with the spacing of its headers and with a typical one: some copies have lost theirs."""
    paths = sorted((real_data / "acdc" / "labels").glob("*.nii.gz"))
    if not paths:
        pytest.skip("ACDC is not present")
    for path in paths[:: max(1, len(paths) // 3)][:3]:
        volume = nib.load(path)
        reference = np.asarray(volume.dataobj).astype(np.uint8)
        own = tuple(float(s) for s in volume.header.get_zooms()[:3])
        for prediction in disagreeing(reference):
            assert assert_equal_scores(prediction, reference, spacing or own) >= 2
