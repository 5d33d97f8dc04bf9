"""Scaling, fitting to the square, and the way back, against slow references."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sss_jax.data.examples import (
    intensity_range,
    place,
    place_plane,
    prepare,
    rescale,
    resize_plane,
    restore_labels,
    restore_probabilities,
    scan,
)
from sss_jax.data.faults import FileFault
from sss_jax.data.geometry import Frame
from sss_jax.data.nifti import Volume, read_labels, read_volume
from sss_jax.data.resize import resize_image, resize_labels, resize_matrix
from sss_jax.options import DataOptions

OPTIONS = DataOptions()
LIMIT = 10**6


def normalise(array, options):
    return rescale(array, *intensity_range(array, options))


def frame(slices=1, spacing=(1.0, 1.0, 1.0), plane=(6, 4)):
    return Frame((slices, *plane), (0, 1, 2), (False, False, False), spacing, 0)


@pytest.mark.parametrize(
    ("source", "target"), [(1, 9), (9, 1), (5, 5), (7, 16), (16, 7), (40, 13), (13, 40), (31, 30)]
)
def test_resize_is_jax_linear_with_antialias(source, target):
    signal = np.random.default_rng(source).random((source,), np.float32)
    want = jax.image.resize(signal, (target,), "linear", antialias=True)
    np.testing.assert_allclose(resize_matrix(source, target) @ signal, want, atol=2e-6)


def test_equal_size_is_the_identity_and_constants_stay():
    np.testing.assert_array_equal(resize_matrix(7, 7), np.eye(7, dtype=np.float32))
    for source, target in ((3, 17), (17, 3), (1, 5), (5, 1)):
        np.testing.assert_allclose(resize_matrix(source, target).sum(1), 1, atol=1e-6)
    padded = resize_matrix(4, 3, 2, 9)
    np.testing.assert_array_equal(padded.any(axis=1), [0, 0, 1, 1, 1, 0, 0, 0, 0])


def slow_labels(label, rows, columns):
    """Votes of every class on the whole plane, then the largest, lowest label first."""
    classes = np.arange(label.max() + 1)
    votes = np.stack(
        [resize_image((label == k).astype(np.float32), rows, columns) for k in classes]
    )
    votes[0] += 1 - votes.sum(axis=0)
    return (votes > votes.max(axis=0) - 1e-6).argmax(axis=0)


@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(1, 6, 5), (3, 9, 4), (2, 17, 20)]),
    size=st.sampled_from([8, 13, 32]),
    fit=st.sampled_from(["letterbox", "stretch"]),
)
@settings(max_examples=50, deadline=None)
def test_labels_take_the_largest_share(seed, shape, size, fit):
    rng = np.random.default_rng(seed)
    blobs = resize_plane(rng.random((*shape[:1], 4, 3), np.float32), max(shape), "stretch")
    label = (blobs[:, : shape[1], : shape[2]] * rng.integers(1, 6)).astype(np.uint8)
    placement = place_plane(frame(plane=shape[1:]), shape[1:], size, fit)
    top, left, height, width = placement.box
    into = resize_matrix(shape[1], height, top, size), resize_matrix(shape[2], width, left, size)
    got = resize_labels(label, *into)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, slow_labels(label, *into))
    np.testing.assert_array_equal(got, resize_plane(label, size, fit))


def test_labels_never_invent_a_class():
    label = np.array([[[1, 3], [3, 1]]], np.uint8)
    assert set(np.unique(resize_plane(label, 31, "stretch"))) <= {1, 3}
    assert not resize_plane(np.zeros((2, 5, 5), np.uint8), 16, "letterbox").any()


def test_letterbox_keeps_true_proportions():
    wide = place_plane(frame(spacing=(5.0, 1.0, 1.0), plane=(50, 100)), (50, 100), 64, "letterbox")
    assert wide.box == (16, 0, 32, 64)
    tall = place_plane(frame(spacing=(5.0, 4.0, 1.0), plane=(50, 100)), (50, 100), 64, "letterbox")
    assert tall.box == (0, 16, 64, 32)
    assert place_plane(frame(plane=(50, 100)), (50, 100), 64, "stretch").box == (0, 0, 64, 64)
    thin = place_plane(frame(plane=(1, 10_000)), (1, 10_000), 64, "letterbox")
    assert thin.box[2:] == (1, 64)


@given(
    low=st.floats(-2000, 2000),
    width=st.floats(1, 5000),
    mode=st.sampled_from(["percentile", "min_max"]),
)
@settings(max_examples=30, deadline=None)
def test_scaling_ignores_the_scanners_units(low, width, mode):
    rng = np.random.default_rng(0)
    plain = rng.gamma(2.0, 1.0, (9, 8, 7)).astype(np.float32)
    options = DataOptions(normalise=mode)
    scaled = normalise(plain, options)
    assert scaled.dtype == np.float32
    assert scaled.min() == 0
    assert scaled.max() == 1
    other = normalise((plain * width + low).astype(np.float32), options)
    np.testing.assert_allclose(other, scaled, atol=2e-3)


def test_percentiles_clip_the_tails():
    values = np.arange(1001, dtype=np.float32).reshape(7, 11, 13)
    scaled = normalise(values, DataOptions(percentile_low=10, percentile_high=90))
    np.testing.assert_allclose(scaled, np.clip((values - 100) / 800, 0, 1), atol=1e-6)


def test_a_volume_of_almost_all_background_keeps_its_object():
    values = np.zeros((30, 30, 10), np.float32)
    values[3, 4, 5] = 8
    np.testing.assert_array_equal(normalise(values, OPTIONS), values / 8)


def test_the_window_is_fixed_and_must_hold_something():
    values = np.linspace(-1500, 1500, 7, dtype=np.float32)
    window = DataOptions(normalise="window", window_low=-500, window_high=500)
    np.testing.assert_allclose(normalise(values, window), [0, 0, 0, 0.5, 1, 1, 1], atol=1e-6)
    with pytest.raises(ValueError, match=r"1000\.\.1500 leave nothing of -500\.\.500"):
        normalise(values[-2:], window)


def test_a_window_that_misses_the_volume_names_the_file(tmp_path, nifti, scene):
    volume = read_volume(nifti(tmp_path / "a.nii", scene[0]), LIMIT)
    missing = DataOptions(normalise="window", window_low=2000, window_high=3000)
    with pytest.raises(FileFault, match=r"a\.nii: intensities .*data\.window_low"):
        prepare(volume, None, 16, missing)


def test_prepare_returns_what_the_network_takes(tmp_path, nifti, scene):
    affine = np.diag((1.0, 1.0, 5.0, 1.0))
    volume = read_volume(nifti(tmp_path / "a.nii", scene[0], affine), LIMIT)
    labels = read_labels(nifti(tmp_path / "b.nii", scene[1], affine), 2, LIMIT, volume)
    example = prepare(volume, labels, 24, OPTIONS)
    assert example.image_SHW.shape == example.label_SHW.shape == (6, 24, 24)
    assert example.image_SHW.dtype == np.float32
    assert example.label_SHW.dtype == np.uint8
    assert example.image_SHW.min() >= 0
    assert example.image_SHW.max() <= 1
    top, left, height, width = example.placement.box
    assert (height, width) == (20, 24)
    outside = np.ones((24, 24), bool)
    outside[top : top + height, left : left + width] = False
    assert not example.image_SHW[:, outside].any()
    assert not example.label_SHW[:, outside].any()
    assert prepare(volume, None, 24, OPTIONS).label_SHW is None


def test_placing_some_slices_equals_placing_all(tmp_path, nifti, scene):
    volume = read_volume(nifti(tmp_path / "a.nii", scene[0]), LIMIT)
    labels = read_labels(nifti(tmp_path / "b.nii", scene[1]), 2, LIMIT, volume)
    whole = scan(volume, labels, OPTIONS)
    every, some = place(whole, 40, OPTIONS), place(whole.read(np.array([1, 3, 4])), 40, OPTIONS)
    np.testing.assert_array_equal(some.image_SHW, every.image_SHW[[1, 3, 4]])
    np.testing.assert_array_equal(some.label_SHW, every.label_SHW[[1, 3, 4]])
    assert whole.nbytes == 12 * 10 * 6 * 5


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
def test_labels_come_back_to_their_voxels(tmp_path, nifti, scene, axis, fit):
    affine = np.diag((-1.0, 1.5, 2.0, 1.0))
    options = DataOptions(slice_axis=axis, fit=fit)
    volume = read_volume(nifti(tmp_path / "a.nii", scene[0], affine), LIMIT)
    labels = read_labels(nifti(tmp_path / "b.nii", scene[1], affine), 2, LIMIT, volume)
    example = prepare(volume, labels, 96, options)
    back = restore_labels(np.eye(3, dtype=np.float32)[example.label_SHW], example.placement)
    assert back.shape == scene[1].shape
    assert back.dtype == np.uint8
    assert (back != scene[1]).mean() < 0.01
    assert (back[scene[1] > 0] == scene[1][scene[1] > 0]).mean() > 0.97


def test_probabilities_come_back_linear_and_normalised():
    rng = np.random.default_rng(3)
    placement = place_plane(frame(2, (1.0, 2.0, 1.0), (9, 14)), (9, 14), 20, "letterbox")
    prob = rng.dirichlet((1, 1, 1), (2, 20, 20)).astype(np.float32)
    back = restore_probabilities(prob, placement)
    assert back.shape == (2, 9, 14, 3)
    np.testing.assert_allclose(back.sum(-1), 1, atol=1e-5)
    top, left, height, width = placement.box
    inner = prob[:, top : top + height, left : left + width]
    want = jax.image.resize(inner, (2, 9, 14, 3), "linear", antialias=True)
    np.testing.assert_allclose(back, want, atol=1e-5)


def test_the_class_is_chosen_after_resizing_the_probabilities():
    placement = place_plane(frame(1, plane=(2, 2)), (2, 2), 4, "stretch")
    prob = np.zeros((1, 4, 4, 3), np.float32)
    prob[..., 1], prob[..., 2] = 0.4, 0.6
    prob[:, 0, 0] = (0, 1, 0)  # averaged with its neighbours, class 1 wins this voxel
    assert restore_labels(prob, placement)[0].tolist() == [[1, 2], [2, 2]]
    with pytest.raises(ValueError, match="2 slices of probabilities for a volume of 1"):
        restore_labels(np.concatenate([prob, prob]), placement)


def test_labels_of_another_grid_are_refused(scene):
    affine = np.eye(4)
    image = Volume(scene[0].astype(np.float32), affine, (1.0,) * 3, True, None, "image.nii")
    label = Volume(scene[1][1:].astype(np.uint8), affine, (1.0,) * 3, True, None, "label.nii")
    with pytest.raises(FileFault, match="has the shape"):
        scan(image, label, OPTIONS)


@pytest.mark.parametrize(
    ("case", "side"), [("acdc/{}/patient002_frame01", 256), ("hippocampus/{}/hippocampus_003", 128)]
)
def test_real_labels_survive_the_square(real_data, case, side):
    volume = read_volume(real_data / f"{case.format('images')}.nii.gz", 2**24)
    labels = read_labels(real_data / f"{case.format('labels')}.nii.gz", 3, 2**24, volume)
    example = prepare(volume, labels, side, OPTIONS)
    classes = labels.array.max() + 1
    back = restore_labels(np.eye(classes, dtype=np.float32)[example.label_SHW], example.placement)
    for k in range(1, classes):
        mine, true = back == k, labels.array == k
        assert 2 * (mine & true).sum() / (mine.sum() + true.sum()) > 0.985
