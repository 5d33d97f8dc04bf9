"""Phantoms: a small data set with known truth, for demos and tests where no data is at hand.

A phantom is a torso-like volume with three labelled structures (an organ, the wall of a chamber,
a vessel) among unlabelled ones of the same intensities, so position and shape decide, not
brightness. Subjects differ in size, pose, shape, contrast and scanner. No patient is involved.
"""

import csv
import dataclasses
import gzip
import io
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sss_jax.atomic import write_bytes
from sss_jax.data.anatomy import (
    CLASS_NAMES,
    CLASS_OF_TISSUE,
    Tissue,
    body_coordinates,
    smooth_noise,
    tissue_map,
)
from sss_jax.errors import ConfigError, DataError

_FINE = 2  # in-plane samples per pixel and axis; partial volume comes from averaging them

# Mean intensity of each tissue under two scanner styles: bright blood and dark blood.
_STYLES: dict[Tissue, tuple[float, float]] = {
    Tissue.AIR: (0.02, 0.02),
    Tissue.FAT: (0.78, 0.92),
    Tissue.MUSCLE: (0.34, 0.44),
    Tissue.VISCERAL: (0.46, 0.74),
    Tissue.BONE: (0.52, 0.62),
    Tissue.CORD: (0.62, 0.34),
    Tissue.SPLEEN: (0.60, 0.40),
    Tissue.KIDNEY: (0.58, 0.46),
    Tissue.BOWEL_WALL: (0.31, 0.48),
    Tissue.BOWEL_LUMEN: (0.74, 0.22),
    Tissue.VEIN: (0.78, 0.20),
    Tissue.LIVER: (0.62, 0.50),
    Tissue.HEART_WALL: (0.28, 0.48),
    Tissue.BLOOD: (0.82, 0.14),
    Tissue.ARTERY: (0.84, 0.14),
}

_FOLDERS = ("images", "labels")
_ORIENTATIONS = ("RAS", "LPS", "LAS", "RAS", "LPI", "RAS", "SAR", "LPS")

_README = """# Phantoms (synthetic)

{n} torso-like volumes drawn by `sss_jax.data.synthetic` with seed {seed}. No patient is involved;
the files are free of rights. They show that the software runs and learns; results on them say
nothing about results on patients.

- Labels: 0 background, 1 organ (liver-like), 2 wall (around a chamber), 3 vessel (left of the
  spine). Vein, spleen, kidneys and bowel have similar intensities and are background.
- 64-80 x 64-80 x 12-20 voxels, 1.8-3.1 mm in plane, 5-8 mm between slices, int16 and uint8,
  several orientations, one volume in four oblique.
- Two scanner styles (bright and dark blood, two to one) with contrast, bias field, blur and noise
  of their own for every subject.
- Subjects of the part `unlabelled` have no label file unless the set was written with all labels.
"""


@dataclasses.dataclass(frozen=True)
class SplitSizes:
    """Subjects in each part of the data set."""

    labelled: int = 2
    unlabelled: int = 30
    val: int = 4
    test: int = 8


@dataclasses.dataclass(frozen=True)
class Phantom:
    """One volume, axes (right, front, head), with its label map and its place in the world."""

    image: NDArray[np.int16]
    label: NDArray[np.uint8]
    affine: NDArray[np.float64]
    style: str


def _downsample(fine: NDArray[np.float32]) -> NDArray[np.float32]:
    """Average the in-plane samples of each pixel and mix neighbouring slices slightly."""
    x, y, z = fine.shape
    mean = fine.reshape(x // _FINE, _FINE, y // _FINE, _FINE, z).mean(axis=(1, 3))
    return ndimage.correlate1d(mean, np.array((0.1, 0.8, 0.1), np.float32), axis=2, mode="nearest")


def _label(tissue: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Class with the largest share of each pixel, slices kept apart."""
    classes = CLASS_OF_TISSUE[tissue]
    x, y, z = classes.shape
    blocks = classes.reshape(x // _FINE, _FINE, y // _FINE, _FINE, z)
    shares = [(blocks == k).sum(axis=(1, 3)) for k in range(len(CLASS_NAMES) + 1)]
    return np.argmax(np.stack(shares), axis=0).astype(np.uint8)


def _intensities(rng: np.random.Generator, dark_blood: bool) -> NDArray[np.float32]:
    """Mean intensity of each tissue for one subject, [tissues]."""
    mix = np.clip(abs(rng.normal(0.0, 0.14)), 0.0, 0.35)
    mix = 1.0 - mix if dark_blood else mix
    table = np.array([_STYLES[t] for t in Tissue])
    mean = (1.0 - mix) * table[:, 0] + mix * table[:, 1]
    mean[1:] += rng.normal(0.0, 0.045, len(table) - 1)
    return np.clip(mean, 0.01, 1.0).astype(np.float32)


def _signal(
    rng: np.random.Generator, tissue: NDArray[np.uint8], dark_blood: bool
) -> NDArray[np.float32]:
    """Noise-free signal on the fine grid: tissue means, texture and the coil's bias field."""
    signal = _intensities(rng, dark_blood)[tissue]
    grain = ndimage.gaussian_filter(
        rng.standard_normal(tissue.shape).astype(np.float32), (2.2, 2.2, 0.6)
    )
    grain /= grain.std()
    strength = np.full(len(Tissue), 0.03, np.float32)
    strength[[Tissue.AIR, Tissue.VISCERAL, Tissue.BOWEL_LUMEN]] = (0.0, 0.09, 0.07)
    signal = signal + strength[tissue] * grain
    bias = smooth_noise(rng, tissue.shape, (3, 3, 2)) * np.float32(rng.uniform(0.05, 0.2))
    return np.clip(signal, 0.0, None) * np.exp(bias)


def _acquire(rng: np.random.Generator, signal: NDArray[np.float32]) -> NDArray[np.int16]:
    """Blur, slice profile, gamma, Rician noise, and the scanner's arbitrary scale."""
    sharp = rng.uniform(0.4, 1.0) * _FINE
    image = _downsample(ndimage.gaussian_filter(signal, (sharp, sharp, 0.0)))
    image = np.clip(image, 0.0, None) ** np.float32(rng.uniform(0.8, 1.25))
    sigma = rng.uniform(0.015, 0.06)
    real, imaginary = rng.normal(0.0, sigma, (2, *image.shape))
    scale = rng.uniform(250.0, 1800.0)
    return np.clip(np.round(np.hypot(image + real, imaginary) * scale), 0, 32767).astype(np.int16)


def _affine(
    rng: np.random.Generator, shape: tuple[int, int, int], spacing: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Voxel-to-world matrix, mm; one volume in four is cut obliquely by up to 12 degrees."""
    oblique = rng.random() < 0.25
    angles = np.deg2rad(rng.uniform(-12.0, 12.0, 2)) * oblique
    (ca, cb), (sa, sb) = np.cos(angles), np.sin(angles)
    turn = np.array(((1, 0, 0), (0, ca, -sa), (0, sa, ca))) @ np.array(
        ((cb, 0, sb), (0, 1, 0), (-sb, 0, cb))
    )
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing
    centre = rng.uniform(-60.0, 60.0, 3)
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(shape) - 1.0) / 2.0)
    return affine


def make_phantom(seed: int, subject: int) -> Phantom:
    """Draw one subject; the result depends on the two numbers alone.

    Args:
      seed: seed of the data set.
      subject: number of the subject, from 0. Every third one (1, 4, ...) has dark blood.

    Returns:
      A volume of 64-80 x 64-80 x 12-20 voxels, 1.8-3.1 mm in plane, 5-8 mm between slices.
    """
    rng = np.random.default_rng((seed, subject))
    shape = (
        int(rng.integers(32, 41)) * 2,
        int(rng.integers(32, 41)) * 2,
        int(rng.integers(12, 21)),
    )
    extent = rng.uniform((182.0, 148.0, 90.0), (198.0, 166.0, 105.0))
    spacing = np.array((*extent[:2] / shape[:2], np.clip(extent[2] / shape[2], 5.0, 8.0))).round(3)
    fine = (shape[0] * _FINE, shape[1] * _FINE, shape[2])
    where = body_coordinates(rng, fine, tuple(spacing * shape))
    tissue = tissue_map(rng, where)
    dark_blood = subject % 3 == 1
    image = _acquire(rng, _signal(rng, tissue, dark_blood))
    affine = _affine(rng, shape, spacing)
    return Phantom(image, _label(tissue), affine, "dark blood" if dark_blood else "bright blood")


def _oriented(phantom: Phantom, number: int) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """Store image and label along the axes that scanner `number` would use: mm, codes 1."""
    codes = _ORIENTATIONS[number % len(_ORIENTATIONS)]
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(phantom.affine), nib.orientations.axcodes2ornt(codes)
    )
    pair = []
    for array in (phantom.image, phantom.label):
        volume = nib.Nifti1Image(array, phantom.affine).as_reoriented(turn)
        volume.header.set_xyzt_units("mm", "sec")
        volume.set_qform(volume.affine, code=1)
        volume.set_sform(volume.affine, code=1)
        pair.append(volume)
    return pair[0], pair[1]


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content)


def _parts(sizes: SplitSizes) -> dict[str, list[str]]:
    """Names of the subjects in each part, numbered through."""
    counts = dataclasses.asdict(sizes)
    if min(counts.values()) < 0 or sizes.labelled < 1:
        raise ConfigError(f"a phantom data set needs labelled >= 1 and no negative part: {counts}")
    names = iter(f"phantom_{i:03d}" for i in range(sum(counts.values())))
    return {part: [next(names) for _ in range(n)] for part, n in counts.items()}


def _refuse_foreign(folder: Path, expected: set[str]) -> None:
    """Do not mix phantoms into a folder that holds something else."""
    found = {f"{p.parent.name}/{p.name}" for d in _FOLDERS for p in (folder / d).glob("[!.]*")}
    foreign = sorted(found - expected)
    if foreign:
        raise DataError(
            f"{folder} already holds files that are not of this phantom set, such as "
            f"{foreign[0]} ({len(foreign)} in all); choose an empty folder"
        )


def write_phantoms(
    folder: str | os.PathLike[str],
    *,
    subjects: SplitSizes | None = None,
    seed: int = 0,
    all_labels: bool = False,
) -> Path:
    """Write a phantom data set: `images/`, `labels/`, `split.json`, `cases.csv`, `README.md`.

    Subjects keep their content when the sizes of the parts change; the same arguments write the
    same files again, each put in place whole.

    Args:
      folder: where to write; it may hold the same set already, but no other.
      subjects: subjects in each part; by default 2 labelled, 30 unlabelled, 4 val, 8 test.
      seed: seed of the data set.
      all_labels: write the unlabelled subjects' labels too, to measure pseudo-labels or the
        ceiling; without it a training run cannot see them at all.

    Returns:
      The folder.

    Raises:
      ConfigError: no labelled subject, or a negative count.
      DataError: the folder holds other images or labels.
    """
    folder, parts = Path(folder), _parts(subjects or SplitSizes())
    names = [name for part in parts.values() for name in part]
    hidden = set() if all_labels else set(parts["unlabelled"])
    files = {f"images/{n}.nii.gz" for n in names}
    _refuse_foreign(folder, files | {f"labels/{n}.nii.gz" for n in names if n not in hidden})
    rows = []
    for number, name in enumerate(names):
        phantom = make_phantom(seed, number)
        image, label = _oriented(phantom, number)
        _write(folder / "images" / f"{name}.nii.gz", gzip.compress(image.to_bytes(), 6, mtime=0))
        if name not in hidden:
            content = gzip.compress(label.to_bytes(), 6, mtime=0)
            _write(folder / "labels" / f"{name}.nii.gz", content)
        rows.append(_row(name, phantom, image, name in hidden))
    _write(folder / "cases.csv", _table(rows))
    _write(folder / "README.md", _README.format(seed=seed, n=len(names)).encode())
    split = {
        "about": f"Phantoms drawn with seed {seed}; subject-level, one volume a subject.",
        "unit": "subject",
        **parts,
        "cases": parts,
        "class_names": list(CLASS_NAMES),
    }
    _write(folder / "split.json", json.dumps(split, indent=1).encode() + b"\n")
    return folder


def _row(name: str, phantom: Phantom, stored: nib.Nifti1Image, hidden: bool) -> dict[str, object]:
    """One line of cases.csv; the counts of a hidden label stay empty."""
    counts = np.bincount(phantom.label.ravel(), minlength=len(CLASS_NAMES) + 1)
    return {
        "case": name,
        "subject": name,
        "style": phantom.style,
        "orientation": "".join(nib.aff2axcodes(stored.affine)),
        **dict(zip(("nx", "ny", "nz"), stored.shape, strict=True)),
        **{
            f"vox_{k}": "" if hidden else int(n)
            for k, n in zip(("background", *CLASS_NAMES), counts, strict=True)
        },
    }


def _table(rows: list[dict[str, object]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
