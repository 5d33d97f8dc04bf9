"""What a NIfTI header declares, checked before any voxel is read.

NIfTI-1 and NIfTI-2 single files in either byte order. Whatever a header may claim, nothing of
its size is allocated here.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.quaternions import quat2mat
from numpy.typing import NDArray

from sss_jax.data.faults import FileFault

NIFTI1_SIZE, NIFTI2_SIZE = 348, 540
_MAX_EXTENSIONS = 2**26
_MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
_READ_AGAIN = "export or download the file again"


@dataclasses.dataclass(frozen=True)
class Declared:
    """The checked content of a header.

    Attributes:
        header: the nibabel header, for writing files on the same grid.
        shape: voxels along the three stored axes.
        dtype: type of the stored numbers, byte order included.
        offset: bytes before the first voxel.
        slope: factor of the stored numbers.
        inter: offset added after the factor.
        affine: voxel indices to millimetres in (right, front, head), [4, 4].
        spacing: distance of neighbouring voxels along the stored axes, mm.
        oriented: False where the file says nothing on orientation (qform and sform codes 0).
    """

    header: Any
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    inter: float
    affine: NDArray[np.float64]
    spacing: tuple[float, float, float]
    oriented: bool

    @property
    def voxels(self) -> int:
        """Number of voxels."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes up to the end of the last voxel."""
        return self.offset + self.voxels * self.dtype.itemsize


def parse_header(block: bytes, path: Path, max_voxels: int) -> Declared:
    """Check the first bytes of a NIfTI file.

    Args:
        block: the first 540 bytes, or the whole file where it is shorter.
        path: named in errors.
        max_voxels: refuse more.

    Raises:
        FileFault: not NIfTI, or a declaration that cannot be used.
    """
    header = _nifti_header(block, path)
    shape = _shape(header, path, max_voxels)
    dtype = _dtype(header, path)
    slope, inter = _scaling(header, path)
    pixdim = _pixdim(header, path)
    affine, oriented = _affine(header, pixdim, path)
    scale = _MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)
    affine[:3] *= scale
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    first, second, third = (float(s) for s in spacing)
    offset = _offset(header, path)
    return Declared(
        header, shape, dtype, offset, slope, inter, affine, (first, second, third), oriented
    )


def _nifti_header(block: bytes, path: Path) -> Any:
    if len(block) < NIFTI1_SIZE:
        raise FileFault(path, f"is no NIfTI file: only {len(block)} bytes", _READ_AGAIN)
    sizes = {int.from_bytes(block[:4], "little"), int.from_bytes(block[:4], "big")}
    if NIFTI1_SIZE in sizes and block[344:348] == b"n+1\0":
        return nib.Nifti1Header(block[:NIFTI1_SIZE], check=False)
    if NIFTI2_SIZE in sizes and block[4:8] == b"n+2\0" and len(block) >= NIFTI2_SIZE:
        return nib.Nifti2Header(block[:NIFTI2_SIZE], check=False)
    if NIFTI1_SIZE in sizes:
        problem = "is an ANALYZE file or half of a NIfTI pair (.hdr/.img), not a single NIfTI file"
        raise FileFault(path, problem, "convert it to .nii.gz")
    raise FileFault(path, "is no NIfTI file: the header does not start like one", _READ_AGAIN)


def _shape(header: Any, path: Path, max_voxels: int) -> tuple[int, int, int]:
    count = int(header["dim"][0])
    sizes = [int(n) for n in header["dim"][1 : count + 1]] if 1 <= count <= 7 else []
    if not sizes or min(sizes) < 1:
        declared = [int(n) for n in header["dim"]]
        raise FileFault(path, f"declares impossible dimensions {declared}", _READ_AGAIN)
    if len(sizes) < 3:
        problem = f"has {len(sizes)} dimensions where a volume has 3"
        raise FileFault(path, problem, "stack the slices of a scan into one volume")
    if max(sizes[3:], default=1) > 1:
        problem = f"has the shape {tuple(sizes)}: several time points or channels"
        raise FileFault(path, problem, "save the time point or channel you mean as a 3-D volume")
    if math.prod(sizes) > max_voxels:
        problem = f"declares {math.prod(sizes):,} voxels; the limit is {max_voxels:,}"
        raise FileFault(path, problem, "raise data.max_voxels if the file is right, or crop it")
    return sizes[0], sizes[1], sizes[2]


def _dtype(header: Any, path: Path) -> np.dtype[Any]:
    try:
        dtype = header.get_data_dtype()
    except Exception:  # nibabel raises several kinds for an unknown code
        dtype = None
    if dtype is None or dtype.kind not in "iuf" or dtype.itemsize > 8:
        kind = dtype if dtype is not None else f"code {int(header['datatype'])}"
        problem = f"stores numbers of the type {kind}, not one real number for each voxel"
        raise FileFault(path, problem, "convert it to int16 or float32")
    return np.dtype(dtype)


def _scaling(header: Any, path: Path) -> tuple[float, float]:
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    # Zero is the format's, NaN is nibabel's way to say that the numbers are not scaled.
    if slope == 0 or math.isnan(slope):
        return 1.0, 0.0
    if not (math.isfinite(slope) and math.isfinite(inter)):
        problem = f"scales its numbers by a slope of {slope} and an offset of {inter}"
        raise FileFault(path, problem, "set scl_slope and scl_inter to finite numbers")
    return slope, inter


def _pixdim(header: Any, path: Path) -> NDArray[np.float64]:
    pixdim = np.asarray(header["pixdim"][1:4], np.float64)
    if not np.isfinite(pixdim).all() or (pixdim <= 0).any():
        problem = f"declares the voxel size {pixdim.tolist()}"
        raise FileFault(path, problem, "set pixdim to the real, positive voxel size")
    return pixdim


def _affine(
    header: Any, pixdim: NDArray[np.float64], path: Path
) -> tuple[NDArray[np.float64], bool]:
    """Return the affine in file units (sform before qform, as nibabel does) and if it is known."""
    if int(header["sform_code"]) > 0:
        affine = np.eye(4)
        affine[:3] = [header[row] for row in ("srow_x", "srow_y", "srow_z")]
    elif int(header["qform_code"]) > 0:
        affine = _qform(header, pixdim)
    else:
        return np.diag((*pixdim, 1.0)), False
    if not np.isfinite(affine).all():
        raise FileFault(path, "has an affine with NaN or infinite entries", _READ_AGAIN)
    axes = affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    if (lengths == 0).any() or abs(np.linalg.det(axes / lengths)) < 1e-3:
        problem = "has an affine that flattens space: two of its axes point the same way"
        raise FileFault(path, problem, _READ_AGAIN)
    return affine, True


def _qform(header: Any, pixdim: NDArray[np.float64]) -> NDArray[np.float64]:
    b, c, d = (float(header[f"quatern_{letter}"]) for letter in "bcd")
    # Rounding may push b^2 + c^2 + d^2 a little above 1.
    a = math.sqrt(max(0.0, 1.0 - (b * b + c * c + d * d))) if math.isfinite(b + c + d) else b
    affine = np.full((4, 4), np.nan)
    if math.isfinite(a) and b * b + c * c + d * d < 1.001:
        affine = np.eye(4)
        handed = -1.0 if float(header["pixdim"][0]) == -1 else 1.0
        affine[:3, :3] = quat2mat((a, b, c, d)) * (pixdim * (1.0, 1.0, handed))
        affine[:3, 3] = [float(header[f"qoffset_{letter}"]) for letter in "xyz"]
    return affine


def _offset(header: Any, path: Path) -> int:
    smallest = 352 if int(header["sizeof_hdr"]) == NIFTI1_SIZE else 544
    offset = float(header["vox_offset"])
    if offset == 0:
        return smallest
    if not (smallest <= offset <= _MAX_EXTENSIONS and offset == int(offset)):
        raise FileFault(path, f"says that voxels start at byte {offset}", _READ_AGAIN)
    return int(offset)
