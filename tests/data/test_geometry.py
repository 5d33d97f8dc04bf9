"""Every stored form of a scene becomes the same slices, and goes back exactly."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sss_jax.data.examples import prepare, restore_labels
from sss_jax.data.geometry import coarsest, from_slices, make_frame, to_slices, turn
from sss_jax.data.nifti import Volume, read_labels, read_volume, write_labels
from sss_jax.options import DataOptions

SPACING = np.array((1.5, 0.8, 4.0))
FORMS = [
    (order, flips)
    for order in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]


def stored_form(array, order, flips):
    """Store an R, A, S array along permuted, flipped axes; return it with its affine."""
    affine = np.diag((*SPACING, 1.0))
    affine[:3, 3] = (-20.0, 35.0, 7.0)
    shape = np.array(array.shape)
    step = np.eye(4)
    step[:3, :3] = np.eye(3)[:, order] * np.array(flips)
    backwards = np.array([flips[order.index(axis)] < 0 for axis in range(3)])
    step[:3, 3] = np.where(backwards, shape - 1, 0)
    slices = tuple(slice(None, None, f) for f in flips)
    return np.transpose(array, order)[slices], affine @ step


def as_volume(array, affine, oriented=True):
    spacing = tuple(np.linalg.norm(affine[:3, :3], axis=0))
    return Volume(array, affine, spacing, oriented, None, None)


def test_the_views_are_those_of_radiology():
    r, a, s = np.meshgrid(*map(np.arange, (4, 5, 6)), indexing="ij")
    affine = np.diag((1.0, 1.0, 1.0, 1.0))
    world = as_volume(100 * r + 10 * a + s, affine)
    axial, _ = to_slices(world, 2)
    # First slice at the feet, first row in front, first column at the patient's right.
    assert axial.shape == (6, 5, 4)
    assert axial[0, 0, 0] == 100 * 3 + 10 * 4
    assert axial[1, 0, 0] - axial[0, 0, 0] == 1
    assert axial[0, 1, 0] - axial[0, 0, 0] == -10
    assert axial[0, 0, 1] - axial[0, 0, 0] == -100
    coronal, _ = to_slices(world, 1)
    assert coronal.shape == (5, 6, 4)
    assert coronal[0, 0, 0] == 100 * 3 + 5
    assert coronal[1, 1, 1] == 100 * 2 + 10 + 4
    sagittal, _ = to_slices(world, 0)
    assert sagittal.shape == (4, 6, 5)
    assert sagittal[0, 0, 0] == 10 * 4 + 5
    assert sagittal[1, 1, 1] == 100 + 10 * 3 + 4


def test_without_orientation_nothing_is_turned():
    array = np.arange(4 * 5 * 6).reshape(4, 5, 6)
    slices, frame = to_slices(as_volume(array, np.eye(4), oriented=False), -1)
    np.testing.assert_array_equal(slices, array.transpose(2, 1, 0))
    assert frame.flips == (False, False, False)


@pytest.mark.parametrize("axis", [-1, 0, 1, 2])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_all_48_stored_forms_give_equal_slices(scene, form, axis):
    plain, _ = to_slices(as_volume(scene[0], np.diag((*SPACING, 1.0))), axis)
    array, affine = stored_form(scene[0], *form)
    slices, frame = to_slices(as_volume(array, affine), axis)
    np.testing.assert_array_equal(slices, plain)
    np.testing.assert_array_equal(from_slices(slices, frame), array)
    cut = 2 if axis == -1 else axis
    assert frame.spacing[0] == pytest.approx(SPACING[cut])


@given(
    form=st.sampled_from(FORMS),
    angles=st.tuples(*[st.floats(-0.5, 0.5)] * 3),
    axis=st.integers(-1, 2),
)
@settings(max_examples=40, deadline=None)
def test_moderately_oblique_volumes_turn_like_straight_ones(form, angles, axis):
    a, b, c = angles
    tilt = np.eye(4)
    tilt[:2, :2] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]
    tilt[1:3, 1:3] = tilt[1:3, 1:3] @ [[np.cos(b), -np.sin(b)], [np.sin(b), np.cos(b)]]
    tilt[0, 3] = c
    array, affine = stored_form(np.arange(120).reshape(4, 5, 6), *form)
    straight = make_frame(as_volume(array, affine), axis)
    angle = np.degrees(np.arccos(np.clip(np.diag(tilt)[:3], -1, 1))).max()
    if angle < 30:
        oblique = make_frame(as_volume(array, tilt @ affine), axis)
        assert (oblique.axes, oblique.flips) == (straight.axes, straight.flips)


@given(
    shape=st.tuples(*[st.integers(1, 5)] * 3), form=st.sampled_from(FORMS), axis=st.integers(-1, 2)
)
@settings(max_examples=40, deadline=None)
def test_there_and_back_is_exact(shape, form, axis):
    array, affine = stored_form(np.arange(np.prod(shape)).reshape(shape), *form)
    slices, frame = to_slices(as_volume(array, affine), axis)
    np.testing.assert_array_equal(from_slices(slices, frame), array)
    np.testing.assert_array_equal(turn(array, frame), slices)


@pytest.mark.parametrize(
    ("spacing", "axis"),
    [
        ((1, 1, 1), 2),
        ((1, 1, 1.1), 2),
        ((5, 1, 1), 0),
        ((1, 5, 1), 1),
        ((5, 4.9, 1), 2),
        ((1, 1.21, 1), 1),
        ((1, 1.19, 1), 2),
    ],
)
def test_the_coarsest_axis_must_stand_out(spacing, axis):
    assert coarsest(list(spacing)) == axis


def test_files_of_all_48_forms_are_predicted_alike(tmp_path, nifti, scene):
    """The network is fed the same pixels, and its answer lands on the same tissue."""
    options = DataOptions()
    images, answers = [], []
    for order, flips in FORMS:
        image, affine = stored_form(scene[0], order, flips)
        label, _ = stored_form(scene[1], order, flips)
        volume = read_volume(nifti(tmp_path / "i.nii", image, affine), 10**6)
        labels = read_labels(nifti(tmp_path / "l.nii", label, affine), 2, 10**6, volume)
        example = prepare(volume, labels, 32, options)
        images.append(example.image_SHW.tobytes() + example.label_SHW.tobytes())
        answer = restore_labels(np.eye(3, dtype=np.float32)[example.label_SHW], example.placement)
        assert answer.shape == image.shape
        write_labels(tmp_path / "o.nii", answer, volume)
        written = read_labels(tmp_path / "o.nii", 2, 10**6, volume)
        upright, _ = to_slices(written, 2)
        answers.append(upright.tobytes())
        assert (answer == label).mean() > 0.97
    assert len(set(images)) == 1
    assert len(set(answers)) == 1


def test_the_two_scans_with_real_affines_stand_upright(real_data):
    """The CT is stored right-front-head, the MR left-back-head; both must show the same side."""
    for kind in ("ct", "mr"):
        volume = read_volume(real_data / f"torso_ct_mr/images/torso_{kind}.nii.gz", 10**6)
        label = read_labels(
            real_data / f"torso_ct_mr/labels/torso_{kind}.nii.gz", None, 10**6, volume
        )
        slices, frame = to_slices(label, -1)
        columns = np.nonzero(slices == 5)[2]  # the liver, at the patient's right
        assert columns.mean() < slices.shape[2] / 2
        np.testing.assert_array_equal(from_slices(slices, frame), label.array)
        flipped = to_slices(label, -1)[1].flips
        assert flipped == ((False, True, True) if kind == "ct" else (False, False, False))
