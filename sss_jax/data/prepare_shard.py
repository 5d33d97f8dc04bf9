"""Write one shard of a preparation: its cases one by one, so that one volume is in memory."""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from sss_jax.data.cases import Case
from sss_jax.data.examples import range_of
from sss_jax.data.faults import FileFault
from sss_jax.data.geometry import make_frame, turn
from sss_jax.data.nifti import Volume, read_labels, read_volume
from sss_jax.data.prepared import CaseFacts, FileFacts, ImageFacts, LabelFacts, Origin, ShardFacts
from sss_jax.data.records import identity, new_shard, pack, smallest_type
from sss_jax.options import DataOptions

Write = Callable[[bytes], None]


class Damaged(Exception):
    """Cases of a shard cannot be used; nothing was written."""

    def __init__(self, faults: list[FileFault]) -> None:
        super().__init__(f"{len(faults)} faults")
        self.faults = faults


def write_shard(
    images: Path,
    labels: Path,
    folder: Path,
    cases: Sequence[Case],
    options: DataOptions,
    num_classes: int | None,
) -> ShardFacts:
    """Write the slices of some cases, and those of their labels into a file of its own.

    Args:
        images: file to write.
        labels: file to write if any case has labels.
        folder: data folder, for the paths of the origins.
        cases: what to read; labels too where they name them.
        options: reading, scaling, slice axis.
        num_classes: largest label allowed, None for any.

    Raises:
        Damaged: with the faults of all cases; neither file is there then.
        FileFault: the disk refuses.
    """
    faults: list[FileFault] = []
    facts: list[CaseFacts] = []
    with contextlib.ExitStack() as files:
        image = _Counted(files.enter_context(new_shard(images)))
        label = None
        if any(case.label is not None for case in cases):
            label = _Counted(files.enter_context(new_shard(labels)))
        for case in cases:
            try:
                facts.append(_write_case(case, folder, options, num_classes, image, label))
            except FileFault as fault:
                faults.append(fault)
        if faults:
            raise Damaged(faults)
    labelled = None if label is None else _facts(labels, label.count)
    return ShardFacts(_facts(images, image.count), labelled, tuple(facts))


class _Counted:
    """A writer that knows how many records it has written."""

    def __init__(self, write: Write) -> None:
        self._write, self.count = write, 0

    def __call__(self, record: bytes) -> None:
        self._write(record)
        self.count += 1


def _facts(path: Path, records: int) -> FileFacts:
    return FileFacts(path.stat().st_size, hash_file(path), records)


def _write_case(
    case: Case,
    folder: Path,
    options: DataOptions,
    num_classes: int | None,
    images: _Counted,
    labels: _Counted | None,
) -> CaseFacts:
    source = origin(case.image, folder)
    volume = read_volume(case.image, options.max_voxels)
    low, high = range_of(volume, options)
    label = None
    if case.label is not None:
        assert labels is not None
        label = _write_labels(case, case.label, folder, options, num_classes, volume, labels)
    frame = make_frame(volume, options.slice_axis)
    array_SHW = turn(volume.array, frame)
    image = ImageFacts(images.count, smallest_type(array_SHW), low, high, source)
    for position, plane in enumerate(array_SHW):
        images(pack(plane, image.dtype, identity("image", case.name, source.sha256, position)))
    affine = tuple(tuple(float(x) for x in row) for row in volume.affine)
    return CaseFacts(case.name, case.subject, frame, affine, volume.oriented, image, label)


def _write_labels(
    case: Case,
    path: Path,
    folder: Path,
    options: DataOptions,
    num_classes: int | None,
    volume: Volume,
    labels: _Counted,
) -> LabelFacts:
    source = origin(path, folder)
    read = read_labels(path, num_classes, options.max_voxels, volume)
    array_SHW = turn(read.array, make_frame(volume, options.slice_axis))
    first = labels.count
    for position, plane in enumerate(array_SHW):
        labels(pack(plane, "uint8", identity("label", case.name, source.sha256, position)))
    present = np.flatnonzero(np.bincount(read.array.ravel(order="K"), minlength=1))
    slices = np.flatnonzero(array_SHW.any(axis=(1, 2)))
    known = tuple(int(k) for k in present if k)
    return LabelFacts(first, known, tuple(int(s) for s in slices), source)


def origin(path: Path, folder: Path) -> Origin:
    """Return what identifies a source file.

    Raises:
        FileFault: it cannot be read.
    """
    # A split may name its files through links within the folder: both ends are resolved.
    where = path.resolve().relative_to(folder.resolve())
    try:
        return Origin(where.as_posix(), hash_file(path))
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        raise FileFault(path, problem, "check the path and its permissions") from error


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
