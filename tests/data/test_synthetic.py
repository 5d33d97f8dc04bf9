"""Phantoms: layout, determinism, and the properties that make them a useful task."""

import csv
import hashlib
import itertools
import json

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from sss_jax.data.anatomy import CLASS_NAMES, smooth_noise
from sss_jax.data.synthetic import SplitSizes, make_phantom, write_phantoms
from sss_jax.errors import ConfigError, DataError

SMALL = SplitSizes(labelled=1, unlabelled=2, val=1, test=4)


@pytest.fixture(scope="module")
def phantoms():
    return [make_phantom(0, subject) for subject in range(6)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("phantoms") / "set", subjects=SMALL)


def digests(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_subject_depends_on_seed_and_number_alone(phantoms):
    again = make_phantom(0, 3)
    np.testing.assert_array_equal(again.image, phantoms[3].image)
    np.testing.assert_array_equal(again.affine, phantoms[3].affine)
    assert make_phantom(1, 3).image.shape != again.image.shape or np.any(
        make_phantom(1, 3).image != again.image
    )


def test_shapes_types_and_spacing(phantoms):
    for phantom in phantoms:
        x, y, z = phantom.image.shape
        assert 64 <= x <= 80
        assert 64 <= y <= 80
        assert 12 <= z <= 20
        assert phantom.image.dtype == np.int16
        assert phantom.label.dtype == np.uint8
        assert phantom.label.shape == phantom.image.shape
        spacing = np.linalg.norm(phantom.affine[:3, :3], axis=0)
        assert np.all((spacing[:2] > 1.8) & (spacing[:2] < 3.2))
        assert 5.0 <= spacing[2] <= 8.0
    assert any(np.abs(p.affine[2, 1]) > 1e-3 for p in phantoms)


def test_every_subject_has_every_class_in_several_slices(phantoms):
    for phantom in phantoms:
        assert set(np.unique(phantom.label)) == {0, 1, 2, 3}
        for k in range(1, len(CLASS_NAMES) + 1):
            mask = phantom.label == k
            assert mask.sum() > 200
            assert mask.any(axis=(0, 1)).sum() >= 6


def test_wall_surrounds_a_cavity(phantoms):
    enclosed = []
    for phantom in phantoms:
        wall = phantom.label == 2
        fullest = int(np.argmax(wall.sum(axis=(0, 1))))
        enclosed.append(
            ndimage.binary_fill_holes(wall[:, :, fullest]).sum() - wall[:, :, fullest].sum()
        )
    assert min(enclosed) >= 4


def test_styles_invert_the_contrast_of_the_vessel(phantoms):
    def vessel_over_organ(phantom):
        return np.median(phantom.image[phantom.label == 3]) / np.median(
            phantom.image[phantom.label == 1]
        )

    bright = [vessel_over_organ(p) for p in phantoms if p.style == "bright blood"]
    dark = [vessel_over_organ(p) for p in phantoms if p.style == "dark blood"]
    assert len(bright) == 4
    assert len(dark) == 2
    assert min(bright) > 1.05
    assert max(dark) < 0.8


def test_intensity_alone_does_not_give_the_labels(phantoms):
    # The best possible classifier that sees one voxel's intensity, fitted on the volume itself.
    for phantom in phantoms:
        ranks = np.digitize(phantom.image, np.quantile(phantom.image, np.linspace(0, 1, 65)[1:-1]))
        table = np.stack([np.bincount(ranks[phantom.label == k], minlength=64) for k in range(4)])
        chosen = np.argmax(table, axis=0)[ranks]
        for k in (2, 3):
            predicted, truth = chosen == k, phantom.label == k
            assert 2 * np.sum(predicted & truth) / (predicted.sum() + truth.sum()) < 0.45


def test_position_alone_does_not_give_the_labels(phantoms):
    # Another subject's labels, stretched to the same shape: overlap leaves much to learn.
    scores = []
    for a, b in itertools.pairwise(phantoms):
        zoom = np.array(b.label.shape) / a.label.shape
        moved = ndimage.zoom(a.label, zoom, order=0)
        for k in (1, 2, 3):
            p, t = moved == k, b.label == k
            scores.append(2 * np.sum(p & t) / (p.sum() + t.sum()))
    assert 0.15 < np.mean(scores) < 0.6


def test_written_layout_matches_the_split(written):
    split = json.loads((written / "split.json").read_text())
    assert [len(split[p]) for p in ("labelled", "unlabelled", "val", "test")] == [1, 2, 1, 4]
    names = [n for p in ("labelled", "unlabelled", "val", "test") for n in split["cases"][p]]
    assert len(set(names)) == len(names) == 8
    assert sorted(p.name for p in (written / "images").iterdir()) == [f"{n}.nii.gz" for n in names]
    labels = {p.name.removesuffix(".nii.gz") for p in (written / "labels").iterdir()}
    assert labels == set(names) - set(split["cases"]["unlabelled"])
    assert "no patient" in (written / "README.md").read_text().lower()
    with open(written / "cases.csv", newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    for name in names:
        hidden = name in split["cases"]["unlabelled"]
        assert (rows[name]["vox_organ"] == "") == hidden


def test_written_volumes_agree_with_the_drawn_ones(written):
    orientations = set()
    for number, path in enumerate(sorted((written / "images").iterdir())):
        image, phantom = nib.load(path), make_phantom(0, number)
        assert image.header.get_xyzt_units()[0] == "mm"
        assert image.get_data_dtype() == np.int16
        for code in ("qform_code", "sform_code"):
            assert int(image.header[code]) == 1
        np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-3)
        orientations.add("".join(nib.aff2axcodes(image.affine)))
        # The world position of the brightest voxel is the same in both.
        drawn = nib.as_closest_canonical(nib.Nifti1Image(phantom.image, phantom.affine))
        stored = nib.as_closest_canonical(image)
        np.testing.assert_array_equal(np.asarray(stored.dataobj), np.asarray(drawn.dataobj))
        np.testing.assert_allclose(stored.affine, drawn.affine, atol=1e-3)
    assert len(orientations) >= 5


def test_labels_share_shape_and_affine_with_images(written):
    for path in (written / "labels").iterdir():
        label, image = nib.load(path), nib.load(written / "images" / path.name)
        assert label.shape == image.shape
        assert label.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(label.affine, image.affine)


def test_writing_again_gives_the_same_bytes(written):
    before = digests(written)
    write_phantoms(written, subjects=SMALL)
    assert digests(written) == before


def test_all_labels_adds_the_hidden_ones(tmp_path):
    sizes = SplitSizes(labelled=1, unlabelled=1, val=0, test=0)
    folder = write_phantoms(tmp_path / "a", subjects=sizes, all_labels=True)
    assert len(list((folder / "labels").iterdir())) == 2
    hidden = np.asarray(nib.load(folder / "labels" / "phantom_001.nii.gz").dataobj)
    assert set(np.unique(hidden)) == {0, 1, 2, 3}
    with pytest.raises(DataError, match="choose an empty folder"):
        write_phantoms(folder, subjects=sizes)  # would leave a label behind that it must hide


def test_refuses_a_folder_with_other_data_and_bad_sizes(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "patient.nii.gz").write_bytes(b"precious")
    with pytest.raises(DataError, match="patient"):
        write_phantoms(tmp_path, subjects=SMALL)
    assert [p.name for p in tmp_path.rglob("*.nii.gz")] == ["patient.nii.gz"]
    with pytest.raises(ConfigError, match="labelled"):
        write_phantoms(tmp_path / "b", subjects=SplitSizes(labelled=0))


def test_smooth_noise_is_smooth_and_about_unit():
    field = smooth_noise(np.random.default_rng(0), (40, 30, 20), (5, 4, 3))
    assert field.shape == (40, 30, 20)
    assert 0.3 < field.std() < 1.5
    assert np.abs(np.diff(field, axis=0)).max() < 0.5
