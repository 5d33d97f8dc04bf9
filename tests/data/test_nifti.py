"""Reading refuses what is damaged, hostile or meaningless; writing keeps the grid."""

import gzip
import os
import subprocess
import sys
import warnings

import nibabel as nib
import numpy as np
import pytest

from sss_jax.data.faults import FileFault, shown
from sss_jax.data.nifti import read_labels, read_volume, write_labels
from sss_jax.errors import DataError

LIMIT = 10**6
OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.3, -0.2, 0.1) @ np.diag((1.2, 0.9, 2.5)), (-31.0, 12.5, 40.0)
)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("two", [0, 1])
def test_reads_what_nibabel_reads(tmp_path, nifti, scene, suffix, endian, dtype, two):
    image = scene[0] % 200
    path = nifti(
        tmp_path / f"a{suffix}", image, OBLIQUE, dtype, slope=0.5, inter=-3, endian=endian, two=two
    )
    volume = read_volume(path, LIMIT)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, image * 0.5 - 3)
    np.testing.assert_array_equal(volume.array, nib.load(path).get_fdata())
    np.testing.assert_allclose(volume.affine, nib.load(path).affine, atol=1e-6)
    np.testing.assert_allclose(volume.spacing, (1.2, 0.9, 2.5), rtol=1e-6)
    assert volume.oriented


def test_large_volumes_are_read_in_pieces(tmp_path, nifti):
    image = np.arange(1031 * 1033 * 2).reshape(1031, 1033, 2) % 30000
    volume = read_volume(nifti(tmp_path / "a.nii.gz", image), 2**22)
    np.testing.assert_array_equal(volume.array, image)


@pytest.mark.parametrize("slope", [0.0, np.nan])
def test_a_slope_of_zero_or_nan_means_no_scaling(tmp_path, nifti, scene, slope):
    path = nifti(tmp_path / "a.nii", scene[0], slope=slope, inter=5.0)
    np.testing.assert_array_equal(read_volume(path, LIMIT).array, scene[0])


def test_qform_alone_gives_the_affine(tmp_path, nifti, scene):
    for sign in (1.0, -1.0):
        affine = OBLIQUE @ np.diag((1, 1, sign, 1))
        path = nifti(tmp_path / "a.nii", scene[0], affine, sform=0, qform=1)
        volume = read_volume(path, LIMIT)
        np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
        np.testing.assert_allclose(volume.affine, nib.load(path).affine, atol=1e-5)


def test_without_codes_no_orientation_is_made_up(tmp_path, nifti, scene):
    path = nifti(tmp_path / "a.nii", scene[0], np.diag((2.0, 3.0, 4.0, 1.0)), sform=0)
    volume = read_volume(path, LIMIT)
    assert not volume.oriented
    np.testing.assert_array_equal(volume.affine, np.diag((2.0, 3.0, 4.0, 1.0)))


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1000), ("micron", 0.001), ("mm", 1)])
def test_units_become_millimetres(tmp_path, nifti, scene, unit, factor):
    path = nifti(tmp_path / "a.nii", scene[0], np.diag((2.0, 3.0, 4.0, 1.0)))
    content = bytearray(path.read_bytes())
    content[123] = nib.nifti1.unit_codes.code[unit]
    path.write_bytes(content)
    spacing = np.array(read_volume(path, LIMIT).spacing)
    np.testing.assert_allclose(spacing, np.array((2.0, 3.0, 4.0)) * factor, rtol=1e-6)


def test_trailing_single_dimensions_are_dropped_and_written_back(tmp_path, nifti, scene):
    path = nifti(tmp_path / "a.nii.gz", scene[0][..., None, None])
    volume = read_volume(path, LIMIT)
    assert volume.array.shape == (12, 10, 6)
    write_labels(tmp_path / "out.nii.gz", scene[1], volume)
    assert nib.load(tmp_path / "out.nii.gz").shape == (12, 10, 6, 1, 1)


def cut(data, keep):
    return data[: int(len(data) * keep)]


def flip(data, position):
    return data[:position] + bytes([data[position] ^ 16]) + data[position + 1 :]


# Each fault: file name, how it is made from the bytes of a good .nii, what the message says.
FILE_FAULTS = {
    "truncated_gz": ("a.nii.gz", lambda b: cut(gzip.compress(b), 0.6), "truncated"),
    "no_trailer": ("a.nii.gz", lambda b: gzip.compress(b)[:-6], "truncated"),
    "truncated": ("a.nii", lambda b: cut(b, 0.8), "truncated"),
    "short_header": ("a.nii", lambda b: b[:200], "only 200 bytes"),
    "wrong_crc": ("a.nii.gz", lambda b: flip(gzip.compress(b), -6), "damaged compression"),
    "flipped_bit": ("a.nii.gz", lambda b: flip(gzip.compress(b, 0), 700), "damaged compression"),
    "deflate": ("a.nii.gz", lambda b: gzip.compress(b)[:10] + b"\xff" * 900, "damaged compression"),
    "empty": ("a.nii.gz", lambda b: b"", "is empty"),
    "text": ("a.nii", lambda b: b"patient notes " * 100, "does not start like one"),
    "text_gz": ("a.nii.gz", lambda b: b"patient notes " * 100, "not gzip-compressed"),
    "gz_as_nii": ("a.nii", gzip.compress, "is named .nii but"),
    "nii_as_gz": ("a.nii.gz", lambda b: b, "is named .gz but"),
    "other_name": ("a.img", lambda b: b, "not named .nii"),
    "analyze": ("a.nii", lambda b: b[:344] + bytes(4) + b[348:], "ANALYZE"),
    "pair": ("a.nii", lambda b: b[:344] + b"ni1\0" + b[348:], "ANALYZE"),
    "too_long": ("a.nii.gz", lambda b: gzip.compress(b + bytes(2**20 + 1)), "more data than"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_damaged_files_are_refused(tmp_path, nifti, scene, fault):
    name, damage, message = FILE_FAULTS[fault]
    good = nifti(tmp_path / "good.nii", scene[0] % 200).read_bytes()
    path = tmp_path / name
    path.write_bytes(damage(good))
    for read in (lambda: read_volume(path, LIMIT), lambda: read_labels(path, 255, LIMIT)):
        with pytest.raises(FileFault, match=message) as caught:
            read()
        assert caught.value.path == path
        assert caught.value.fix
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, nifti, scene, value):
    image = scene[0].astype(np.float32)
    image[3, 4, 5] = value
    path = nifti(tmp_path / "a.nii.gz", image, dtype=np.float32)
    with pytest.raises(FileFault, match="NaN or infinite voxels"):
        read_volume(path, LIMIT)


def test_numbers_beyond_float32_are_refused(tmp_path, nifti, scene):
    path = nifti(tmp_path / "a.nii", scene[0] * 1e300, dtype=np.float64)
    with pytest.raises(FileFault, match="NaN or infinite voxels"):
        read_volume(path, LIMIT)


def test_a_constant_image_is_refused(tmp_path, nifti):
    with pytest.raises(FileFault, match="constant: every voxel is 5"):
        read_volume(nifti(tmp_path / "a.nii", np.full((3, 4, 5), 5)), LIMIT)


def test_missing_and_unreadable_files_name_the_path(tmp_path):
    with pytest.raises(FileFault, match="cannot be read: No such file"):
        read_volume(tmp_path / "a.nii.gz", LIMIT)
    (tmp_path / "b.nii").mkdir()
    with pytest.raises(FileFault, match="cannot be read: Is a directory"):
        read_volume(tmp_path / "b.nii", LIMIT)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3.5, "not whole numbers: 3.5"),
        (np.nan, "not whole numbers: nan"),
        (np.inf, "not whole numbers: inf"),
        (3.0, r"outside 0\.\.2: 3"),
        (-1.0, r"outside 0\.\.2: -1"),
        (258.0, r"outside 0\.\.2: 258"),
    ],
)
def test_wrong_labels_are_refused(tmp_path, nifti, scene, value, message):
    label = scene[1].astype(np.float32)
    label[0, 0, 0] = value
    path = nifti(tmp_path / "a.nii.gz", label, dtype=np.float32)
    with pytest.raises(FileFault, match=message):
        read_labels(path, 2, LIMIT)


def test_nearly_whole_labels_are_rounded_not_cut(tmp_path, nifti, scene):
    path = nifti(tmp_path / "a.nii", scene[1] - 1e-4, dtype=np.float32)
    labels = read_labels(path, 2, LIMIT)
    assert labels.array.dtype == np.uint8
    np.testing.assert_array_equal(labels.array, scene[1])


def test_labels_are_scaled_like_images(tmp_path, nifti, scene):
    path = nifti(tmp_path / "a.nii", scene[1] * 10 + 7, slope=0.1, inter=-0.7)
    np.testing.assert_array_equal(read_labels(path, 2, LIMIT).array, scene[1])


def test_without_a_class_number_all_of_uint8_is_allowed(tmp_path, nifti, scene):
    path = nifti(tmp_path / "a.nii", scene[1] * 127)
    assert read_labels(path, None, LIMIT).array.max() == 254
    with pytest.raises(FileFault, match=r"outside 0\.\.255: 400"):
        read_labels(nifti(tmp_path / "b.nii", scene[1] * 200), None, LIMIT)


def test_labels_on_another_grid_are_refused(tmp_path, nifti, scene):
    image = read_volume(nifti(tmp_path / "a.nii", scene[0], OBLIQUE), LIMIT)

    def refused(message, array, affine, **options):
        path = nifti(tmp_path / "b.nii", array, affine, **options)
        with pytest.raises(FileFault, match=message):
            read_labels(path, 2, LIMIT, image)

    refused("has the shape", scene[1][:, :, 1:], OBLIQUE)
    refused("another affine", scene[1], OBLIQUE @ np.diag((-1, 1, 1, 1)))
    refused("another affine", scene[1], OBLIQUE + np.eye(4, k=3) * 0.2)
    refused("lacks an orientation", scene[1], OBLIQUE, sform=0)
    rounded = nifti(tmp_path / "b.nii", scene[1], OBLIQUE + np.eye(4, k=3) * 0.01)
    assert read_labels(rounded, 2, LIMIT, image).array.any()


BOMBS = """
import resource, sys, time
from pathlib import Path
from sss_jax.data.nifti import read_volume, read_labels
from sss_jax.errors import DataError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    for read in (lambda p: read_volume(p, 2**29), lambda p: read_labels(p, 4, 2**29 - 1)):
        start = time.perf_counter()
        try:
            read(Path(path))
            print("READ", path)
        except DataError as error:
            print(error)
        took = time.perf_counter() - start
        if took > 2:
            print("SLOW", path, took)
print("GREW", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_bombs_are_refused_in_little_memory_and_time(tmp_path, nifti, scene, with_header):
    good = nifti(tmp_path / "good.nii", scene[0]).read_bytes()
    gigabyte = gzip.compress(bytes(2**24), 9) * 64  # a gzip file may have many members

    def bomb(name, dims, datatype, tail):
        header = with_header(good, dim=[3, *dims, 1, 1, 1, 1], datatype=datatype)
        path = tmp_path / name
        path.write_bytes(gzip.compress(header[:352]) + tail)
        return path

    paths = [
        bomb("stream.nii.gz", (12, 10, 6), 4, gigabyte),
        bomb("consistent.nii.gz", (1024, 1024, 512), 4, gigabyte),
        bomb("header.nii.gz", (32767, 32767, 1000), 4, b""),
        bomb("hollow.nii.gz", (512, 512, 1024), 16, b""),
    ]
    assert sum(p.stat().st_size for p in paths) < 3 * 2**20
    run = subprocess.run(
        [sys.executable, "-c", BOMBS, *map(str, paths)], capture_output=True, text=True, timeout=60
    )
    lines = run.stdout.splitlines()
    assert not run.stderr
    assert len(lines) == 9
    assert not [line for line in lines if line.startswith(("READ", "SLOW"))]
    assert "would grow" in lines[2]
    assert all("bytes cannot hold" in line for line in lines[6:8])
    assert int(lines[-1].split()[1]) < 256 * 1024


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("two", [0, 1])
def test_written_labels_keep_the_grid(tmp_path, nifti, scene, suffix, endian, two):
    options = {"sform": 2, "qform": 1, "slope": 3.0, "endian": endian, "two": two}
    source = nifti(tmp_path / "in.nii", scene[0], OBLIQUE, np.float32, **options)
    target = tmp_path / f"out{suffix}"
    write_labels(target, scene[1], read_volume(source, LIMIT))
    was, now = nib.load(source), nib.load(target)
    assert type(now) is type(was)
    assert now.get_data_dtype() == np.dtype(np.uint8)
    np.testing.assert_array_equal(np.asarray(now.dataobj), scene[1])
    fields = ["dim", "pixdim", "sform_code", "qform_code", "xyzt_units", "srow_x", "srow_y"]
    fields += ["srow_z", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y"]
    for field in [*fields, "qoffset_z"]:
        np.testing.assert_array_equal(now.header[field], was.header[field], err_msg=field)
    assert (now.dataobj.slope, now.dataobj.inter) == (1.0, 0.0)
    assert now.header.endianness == endian
    assert [p.name for p in tmp_path.iterdir() if p not in (source, target)] == []


@pytest.mark.parametrize("endian", ["<", ">"])
def test_written_bytes_are_stable_and_labels_beyond_uint8_fit(tmp_path, nifti, scene, endian):
    like = read_volume(nifti(tmp_path / "in.nii", scene[0], endian=endian), LIMIT)
    for name in ("a.nii.gz", "b.nii.gz"):
        write_labels(tmp_path / name, scene[1] * 300, like)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert (tmp_path / "a.nii.gz").read_bytes()[4:8] == bytes(4)  # no time of writing
    back = nib.load(tmp_path / "a.nii.gz")
    assert back.get_data_dtype() == np.dtype(np.uint16).newbyteorder(endian)
    np.testing.assert_array_equal(np.asarray(back.dataobj), scene[1] * 300)


def test_free_text_of_the_source_is_not_copied(tmp_path, nifti, scene, with_header):
    path = nifti(tmp_path / "in.nii", scene[0])
    secret = b"DOE^JANE 1970"
    free_text = {"descrip": secret, "aux_file": secret, "db_name": secret}
    path.write_bytes(with_header(path.read_bytes(), **free_text))
    write_labels(tmp_path / "out.nii", scene[1], read_volume(path, LIMIT))
    assert b"DOE" in path.read_bytes()
    assert b"DOE" not in (tmp_path / "out.nii").read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path, nifti, scene, monkeypatch):
    like = read_volume(nifti(tmp_path / "in.nii", scene[0]), LIMIT)
    write_labels(tmp_path / "out.nii.gz", scene[1], like)
    before = (tmp_path / "out.nii.gz").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(FileFault, match="cannot be written: No space left"):
        write_labels(tmp_path / "out.nii.gz", scene[1] * 0, like)
    assert (tmp_path / "out.nii.gz").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.nii", "out.nii.gz"]


def test_wrong_arguments_of_write_labels_are_refused(tmp_path, nifti, scene):
    like = read_volume(nifti(tmp_path / "in.nii", scene[0]), LIMIT)
    with pytest.raises(FileFault, match="not the name of a NIfTI file"):
        write_labels(tmp_path / "out.png", scene[1], like)
    with pytest.raises(ValueError, match="shape"):
        write_labels(tmp_path / "out.nii", scene[1][1:], like)
    with pytest.raises(ValueError, match="whole numbers"):
        write_labels(tmp_path / "out.nii", scene[1] * 0.5, like)
    with pytest.raises(ValueError, match="whole numbers"):
        write_labels(tmp_path / "out.nii", scene[1] - 1, like)


def test_names_of_any_bytes_can_be_shown():
    name = os.fsdecode(b"caf\xe9\x1b[31m\n.nii")
    assert shown(name) == r"caf\udce9\x1b[31m\n.nii"
    shown(name).encode("ascii")
    assert isinstance(FileFault(name, "is bad", "mend it"), DataError)


def itk_points(image, indices):
    points = [image.TransformContinuousIndexToPhysicalPoint([float(v) for v in i]) for i in indices]
    return np.array(points) * (-1, -1, 1)  # ITK's world is left, back, head


def test_simpleitk_agrees_on_the_world_and_reads_our_labels(tmp_path, real_data, nifti, scene):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # SWIG's types, on import
        import SimpleITK as sitk

    sources = [real_data / f"torso_ct_mr/images/torso_{kind}.nii.gz" for kind in ("ct", "mr")]
    sources.append(nifti(tmp_path / "oblique.nii.gz", scene[0], OBLIQUE, qform=1))
    for source in sources:
        volume = read_volume(source, LIMIT)
        labels = (volume.array > np.median(volume.array)).astype(np.uint8)
        target = tmp_path / "out.nii.gz"
        write_labels(target, labels, volume)
        corners = np.array([(0, 0, 0), np.array(labels.shape) - 1, (1, 2, 3), (7, 0, 4)])
        ours = nib.affines.apply_affine(volume.affine, corners)
        for path in (source, target):
            np.testing.assert_allclose(itk_points(sitk.ReadImage(path), corners), ours, atol=1e-3)
        back = sitk.GetArrayFromImage(sitk.ReadImage(target))
        np.testing.assert_array_equal(back.transpose(), labels)
