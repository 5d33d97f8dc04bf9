"""Writers of small NIfTI files and folders for the tests of this room."""

import gzip
import json

import nibabel as nib
import numpy as np
import pytest


def make_nifti(
    array,
    affine=None,
    dtype=np.int16,
    *,
    sform=1,
    qform=0,
    slope=None,
    inter=0.0,
    endian="<",
    two=0,
):
    """Return the bytes of a NIfTI file; `array` holds the stored numbers."""
    header = (nib.Nifti2Header if two else nib.Nifti1Header)(endianness=endian)
    header.set_data_dtype(dtype)
    header.set_data_shape(np.shape(array))
    affine = np.eye(4) if affine is None else np.asarray(affine, float)
    sides = np.linalg.norm(np.nan_to_num(affine[:3, :3], nan=1.0), axis=0)
    header["pixdim"][1:4] = sides
    if qform:
        header.set_qform(affine, qform)
    header["sform_code"] = sform
    if sform:
        for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
            header[name] = affine[row]
    header["vox_offset"] = 544 if two else 352
    header["scl_slope"] = np.nan if slope is None else slope
    header["scl_inter"] = np.nan if slope is None else inter
    header.set_xyzt_units("mm")
    stored = np.asarray(array).astype(np.dtype(dtype).newbyteorder(endian))
    return header, header.binaryblock + bytes(4) + stored.tobytes(order="F")


@pytest.fixture
def nifti():
    """Writer `nifti(path, array, affine=None, dtype=int16, **options) -> path`."""

    def write(path, array, affine=None, dtype=np.int16, **options):
        _, content = make_nifti(array, affine, dtype, **options)
        path.parent.mkdir(parents=True, exist_ok=True)
        packed = gzip.compress(content, 1, mtime=0) if path.suffix == ".gz" else content
        path.write_bytes(packed)
        return path

    return write


@pytest.fixture
def scene():
    """An image without symmetry and its labels, [12, 10, 6]."""
    rng = np.random.default_rng(7)
    image = rng.integers(0, 900, (12, 10, 6))
    x, y, z = np.meshgrid(*map(np.arange, image.shape), indexing="ij")
    label = np.where((x > 2) & (x < 8) & (y > 3) & (z > 1) & (z < 5), 1, 0)
    return image, np.where((x > 6) & (y < 3) & (z > 2), 2, label)


@pytest.fixture
def folder(tmp_path, nifti):
    """Maker `folder(names, slices=..., split=...) -> root` of a data folder of small scans."""

    def make(names, slices=6, split=None, labels=True, root=tmp_path / "data"):
        for index, name in enumerate(names):
            rng = np.random.default_rng(index)
            depth = slices[index] if isinstance(slices, (list, tuple)) else slices
            image = rng.integers(0, 500, (9, 8, depth))
            label = (rng.random((9, 8, depth)) > 0.7) * rng.integers(1, 3, (9, 8, depth))
            nifti(root / "images" / f"{name}.nii.gz", image)
            if labels:
                nifti(root / "labels" / f"{name}.nii.gz", label, dtype=np.uint8)
        if split is not None:
            (root / "split.json").write_text(json.dumps(split))
        return root

    return make


@pytest.fixture
def with_header():
    """Function `with_header(content, **fields)`: NIfTI-1 bytes with other header fields."""

    def change(content, **fields):
        header = nib.Nifti1Header(content[:348], check=False)
        for name, value in fields.items():
            header[name] = value
        return header.binaryblock + content[348:]

    return change
