"""Headers that declare what cannot be are refused before a voxel is read."""

import numpy as np
import pytest

from sss_jax.data.faults import FileFault
from sss_jax.data.nifti import read_volume

LIMIT = 10**6

HEADER_FAULTS = {
    "huge": ({"dim": [3, 32767, 32767, 1000, 1, 1, 1, 1]}, "declares 1,073,6.* voxels"),
    "negative": ({"dim": [3, -5, 10, 6, 1, 1, 1, 1]}, "impossible dimensions"),
    "no_dims": ({"dim": [0, 12, 10, 6, 1, 1, 1, 1]}, "impossible dimensions"),
    "flat": ({"dim": [2, 12, 60, 1, 1, 1, 1, 1]}, "2 dimensions"),
    "time": ({"dim": [4, 12, 10, 3, 2, 1, 1, 1]}, "time points or channels"),
    "complex": ({"datatype": 32, "bitpix": 64}, "type complex64"),
    "rgb": ({"datatype": 128, "bitpix": 24}, "type "),
    "unknown_type": ({"datatype": 77}, "code 77"),
    "infinite_slope": ({"scl_slope": np.inf, "scl_inter": 0}, "slope of inf"),
    "nan_inter": ({"scl_slope": 2, "scl_inter": np.nan}, "offset of nan"),
    "zero_pixdim": ({"pixdim": [1, 1, 0, 1, 0, 0, 0, 0]}, "voxel size"),
    "negative_pixdim": ({"pixdim": [1, 1, -1, 1, 0, 0, 0, 0]}, "voxel size"),
    "nan_pixdim": ({"pixdim": [1, np.nan, 1, 1, 0, 0, 0, 0]}, "voxel size"),
    "nan_affine": ({"srow_x": [np.nan, 0, 0, 0]}, "affine with NaN"),
    "flat_affine": ({"srow_x": [0, 1, 0, 0], "srow_y": [0, 1, 0, 0]}, "flattens space"),
    "nan_qform": ({"sform_code": 0, "qform_code": 1, "quatern_b": np.nan}, "affine with NaN"),
    "long_qform": ({"sform_code": 0, "qform_code": 1, "quatern_b": 2}, "affine with NaN"),
    "offset": ({"vox_offset": 100}, "byte 100"),
    "far_offset": ({"vox_offset": 1e12}, "byte 9999"),
    "nan_offset": ({"vox_offset": np.nan}, "byte nan"),
}


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_unusable_headers_are_refused(tmp_path, nifti, scene, with_header, fault):
    fields, message = HEADER_FAULTS[fault]
    path = nifti(tmp_path / "a.nii", scene[0])
    path.write_bytes(with_header(path.read_bytes(), **fields))
    with pytest.raises(FileFault, match=message):
        read_volume(path, LIMIT)
