"""Files that spoil a run if anything reads them: silently, or with an error."""

import nibabel as nib
import numpy as np


def garbage_labels(data, name, classes, seed=0):
    """Random labels on the grid of a case: they can be read, and whoever does learns from them."""
    image = nib.load(data / "images" / f"{name}.nii.gz")
    label = np.random.default_rng(seed).integers(0, classes + 1, image.shape).astype(np.uint8)
    volume = nib.Nifti1Image(label, image.affine, image.header)
    volume.set_data_dtype(np.uint8)
    nib.save(volume, data / "labels" / f"{name}.nii.gz")


def truncated_labels(data, name, classes, seed=0):
    """Labels whose file ends too early: whoever reads them stops."""
    garbage_labels(data, name, classes, seed)
    path = data / "labels" / f"{name}.nii.gz"
    path.write_bytes(path.read_bytes()[:-30])


def nan_image(data, name):
    """An image without a number."""
    path = data / "images" / f"{name}.nii.gz"
    image = nib.load(path)
    array = np.full(image.shape, np.nan, np.float32)
    volume = nib.Nifti1Image(array, image.affine, image.header)
    volume.set_data_dtype(np.float32)
    nib.save(volume, path)
