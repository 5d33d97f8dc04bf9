"""Read every file of a data folder once and report all that is wrong with it, in one run."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from nibabel.orientations import aff2axcodes

from sss_jax.data.cases import Case, Split, load_split
from sss_jax.data.check_report import CaseFacts, CheckReport, Problem
from sss_jax.data.examples import range_of, refuse_large
from sss_jax.data.faults import FileFault, collected
from sss_jax.data.folders import find_cases
from sss_jax.data.geometry import make_frame
from sss_jax.data.nifti import Volume, is_nifti, read_labels, read_volume
from sss_jax.options import DataOptions

_FOLDERS = ("images", "labels", "imagesTr", "labelsTr", "imagesTs", "labelsTs")
_SIDECARS = (".json", ".md", ".csv")


def check_folder(
    root: Path,
    split: Split | str | None = None,
    options: DataOptions | None = None,
    num_classes: int | None = None,
) -> CheckReport:
    """Read the images and labels of a folder and report every problem.

    With a split only its cases are read, and no label of an unlabelled case. Without one, every
    image is read, and every label that is there.

    Args:
        root: data folder.
        split: a split, or the name of a split file in the folder.
        options: reading and intensity scaling; None takes the defaults.
        num_classes: largest label allowed; None for any.

    Raises:
        DataError: no such folder, or no image in it.
    """
    options = options or DataOptions()
    faults: list[FileFault] = []
    found = find_cases(root, faults.append)
    labelled = tuple(c.name for c in found.values() if c.label is not None)
    if isinstance(split, str):
        with collected(faults):
            split = load_split(root, split)
    if isinstance(split, Split):
        cases: Sequence[Case] = split.cases
        labelled = tuple(c.name for c in split.labelled)
    else:
        cases = tuple(found.values())
        faults += _strange_files(root, found.values())
    read = list(_checked(cases, options, num_classes))
    facts = tuple(f for f, _ in read if f is not None)
    faults += [fault for _, case_faults in read for fault in case_faults]
    problems = tuple(Problem(f.path, f.problem, f.fix) for f in _once(faults))
    return CheckReport(root, len(cases), facts, problems, labelled)


def unusable(
    cases: Sequence[Case], options: DataOptions, num_classes: int | None
) -> Iterator[tuple[Case, list[FileFault]]]:
    """Read cases and yield each with what is wrong with it, if anything, in order.

    Args:
        cases: what to read.
        options: reading and intensity scaling.
        num_classes: largest label allowed; None for any.
    """
    for case, (_, faults) in zip(cases, _checked(cases, options, num_classes), strict=True):
        yield case, faults


def _checked(
    cases: Sequence[Case], options: DataOptions, num_classes: int | None
) -> Iterator[tuple[CaseFacts | None, list[FileFault]]]:
    with ThreadPoolExecutor(max(options.threads, 1)) as pool:
        yield from pool.map(lambda case: _check_case(case, options, num_classes), cases)


def _once(faults: list[FileFault]) -> list[FileFault]:
    """Drop repetitions: the split is read after the folder and meets the same duplicates."""
    return list({(f.path, f.problem): f for f in faults}.values())


def _strange_files(root: Path, cases: Iterable[Case]) -> list[FileFault]:
    """Report files that no case uses; hidden files and side notes are left alone."""
    used = {path for case in cases for path in (case.image, case.label)}
    faults = []
    for path in sorted(p for name in _FOLDERS for p in (root / name).glob("*")):
        if path.name.startswith(".") or path.suffix in _SIDECARS or path in used:
            continue
        if not is_nifti(path):
            faults.append(FileFault(path, "is no NIfTI file by its name", "convert or remove it"))
        elif path.parent.name.startswith("labels"):
            faults.append(FileFault(path, "is a label without an image", "add the image"))
    return faults


def _check_case(
    case: Case, options: DataOptions, num_classes: int | None
) -> tuple[CaseFacts | None, list[FileFault]]:
    faults: list[FileFault] = []
    volume, counts = None, None
    with collected(faults):
        volume = read_volume(case.image, options.max_voxels)
    if case.label is not None:
        with collected(faults):
            labels = read_labels(case.label, num_classes, options.max_voxels, volume)
            counts = np.bincount(labels.array.ravel(order="K"), minlength=256)
    if volume is None:
        return None, faults
    with collected(faults):
        range_of(volume, options)
    with collected(faults):
        refuse_large(make_frame(volume, options.slice_axis), case.image, options)
    return _facts(case, volume, counts), faults


def _facts(case: Case, volume: Volume, counts: np.ndarray | None) -> CaseFacts:
    frame = make_frame(volume, -1)
    x, y, z = volume.array.shape
    low, high = (float(p) for p in np.percentile(volume.array, (0.5, 99.5)))
    return CaseFacts(
        name=case.name,
        shape=(x, y, z),
        spacing=volume.spacing,
        orientation="".join(aff2axcodes(volume.affine)) if volume.oriented else "unknown",
        slice_axis=frame.slice_axis,
        slices=frame.shape[frame.axes[0]],
        plane=frame.plane,
        smallest=float(volume.array.min()),
        largest=float(volume.array.max()),
        percentiles=(low, high),
        voxels={} if counts is None else {int(k): int(counts[k]) for k in np.flatnonzero(counts)},
    )


__all__ = ["CheckReport", "check_folder", "unusable"]
