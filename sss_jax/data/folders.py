"""Find the cases of a data folder; nothing is opened but small text files.

Two layouts are read: `images/` and `labels/` with equal file names, and the Medical Segmentation
Decathlon's or nnU-Net's `dataset.json` with `imagesTr/` and `labelsTr/`. Every path, whoever
names it, must stay inside the folder.
"""

import csv
import dataclasses
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from sss_jax.data.faults import FileFault, Report, shown, stop
from sss_jax.data.nifti import is_nifti, stem

PREDICTION_STAMP = "predict.json"
"""Beside predictions: the weights they come from, and the names of the classes."""

PREPARED = "prepared.json"
"""The manifest of shards that `sss-jax data prepare` made; such a folder has no NIfTI file."""

_MAX_TEXT = 2**26
_CHANNEL = re.compile(r"_\d{4}$")
_SUBJECT_COLUMNS = ("subject", "patient")


@dataclasses.dataclass(frozen=True)
class Case:
    """One image and, where training or a metric may use it, its label file.

    Attributes:
        name: file name without extension.
        subject: the person (or animal) it shows; the unit that a split must not divide.
        image: image file.
        label: label file, None for images without one and for unlabelled cases of a split.
    """

    name: str
    subject: str
    image: Path
    label: Path | None


def find_cases(root: Path, report: Report = stop) -> dict[str, Case]:
    """Return the cases of a data folder by name, sorted.

    Subjects come from `cases.csv` (columns `case` and `subject` or `patient`) where it is there,
    else every case is its own subject.

    Args:
        root: data folder.
        report: called with each file that has to be left out; by default the first one is raised.

    Raises:
        DataError: no images; or, unless reported, two images of one name or a path that leaves
            the folder.
    """
    if not root.is_dir():
        raise FileFault(root, "is no folder", "name the folder that holds images/ and labels/")
    _refuse_prepared(root)
    described = root / "dataset.json"
    if described.is_file() and not (root / "images").is_dir():
        images, labels = _decathlon(root, read_json(described), described, report)
    else:
        images = _by_name(root, "images", report)
        labels = _by_name(root, "labels", report)
    if not images:
        problem = "holds no .nii or .nii.gz image"
        raise FileFault(root, problem, "put volumes into images/ and labels of equal name, labels/")
    images = _without_channel(root, images, labels)
    subjects = read_subjects(root)
    return {
        name: Case(name, subjects.get(name, name), image, labels.get(name))
        for name, image in sorted(images.items())
    }


def find_images(path: Path) -> list[Path]:
    """Return the volumes to predict: a file itself, or those of a folder or of its `images/`.

    Raises:
        DataError: none there, or two whose predictions would have one name.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileFault(path, "does not exist", "name a NIfTI file or a folder of them")
    _refuse_prepared(path)
    folder = "." if any(is_nifti(p) for p in path.iterdir()) else "images"
    images = _by_name(path, folder)
    if not images:
        raise FileFault(path, "holds no .nii or .nii.gz file", "name a folder of NIfTI volumes")
    return [images[name] for name in sorted(images)]


def _refuse_prepared(root: Path) -> None:
    if (root / PREPARED).is_file():
        problem = "holds prepared shards for training and no NIfTI file"
        raise FileFault(root, problem, "name the NIfTI folder that it was made from")


def read_subjects(root: Path) -> dict[str, str]:
    """Return the subject of each case that `cases.csv` lists; empty where there is no such file."""
    path = root / "cases.csv"
    if not path.is_file():
        return {}
    rows = list(csv.DictReader(read_text(path).splitlines()))
    columns = set(rows[0]) if rows else set()
    column = next((c for c in _SUBJECT_COLUMNS if c in columns), None)
    if "case" not in columns or column is None:
        problem = "lacks the columns case and subject (or patient)"
        raise FileFault(path, problem, "give it the first line case,subject")
    return {row["case"]: row[column] for row in rows if row["case"] and row[column]}


def read_text(path: Path, limit: int = _MAX_TEXT) -> str:
    """Return a small UTF-8 text file.

    Raises:
        FileFault: missing, unreadable, larger than `limit` bytes or not UTF-8.
    """
    try:
        if path.stat().st_size > limit:
            raise FileFault(path, f"is larger than {limit:,} bytes", "name the right file")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        raise FileFault(path, problem, "check the path and its permissions") from error
    except UnicodeDecodeError as error:
        raise FileFault(path, "is not UTF-8 text", "save it as UTF-8") from error


def read_json(path: Path, limit: int = _MAX_TEXT) -> dict[str, Any]:
    """Return the object of a JSON file of at most `limit` bytes, or raise FileFault."""
    try:
        content = json.loads(read_text(path, limit))
    except (json.JSONDecodeError, RecursionError) as error:
        raise FileFault(path, f"is not valid JSON ({error})", "correct it") from error
    if not isinstance(content, dict):
        raise FileFault(path, "is no JSON object", "start it with { and end it with }")
    return content


def inside(root: Path, path: Path) -> Path:
    """Return `path` if it lies in `root` with all links followed, else raise FileFault."""
    if not path.resolve().is_relative_to(root.resolve()):
        problem = f"leads out of the data folder {shown(root)}"
        raise FileFault(path, problem, "copy the file into the folder instead of linking to it")
    return path


def _by_name(root: Path, folder: str, report: Report = stop) -> dict[str, Path]:
    where = inside(root, root / folder)
    files = sorted(p for p in where.iterdir() if is_nifti(p)) if where.is_dir() else []
    return _unique(files, root, report)


def _unique(paths: Iterable[Path], root: Path, report: Report) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        name = stem(path)
        try:
            inside(root, path)
        except FileFault as fault:
            report(fault)
            continue
        if name in found:
            problem = f"has the same case name as {shown(found[name].name)}"
            report(FileFault(path, problem, "rename or remove one of the two"))
            continue
        found[name] = path
    return found


def _decathlon(
    root: Path, content: dict[str, Any], path: Path, report: Report
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return images and labels by name as `dataset.json` lists them, else as the folders do."""
    training, test = content.get("training", []), content.get("test", [])
    if not training and not test:
        images = [
            p for name in ("imagesTr", "imagesTs") for p in _by_name(root, name, report).values()
        ]
        labels = [
            p for name in ("labelsTr", "labelsTs") for p in _by_name(root, name, report).values()
        ]
        return _unique(images, root, report), _unique(labels, root, report)
    if not isinstance(training, list) or not isinstance(test, list):
        raise FileFault(path, "lists no files under training and test", "see the Decathlon's form")
    pairs = []
    for entry in (*training, *test):
        try:
            image, label = _pair(entry, path)
            labelled = None if label is None else _listed(root, label, path)
            pairs.append((_listed(root, image, path), labelled))
        except FileFault as fault:
            report(fault)
    named = {stem(image): label for image, label in pairs if label is not None}
    return _unique((image for image, _ in pairs), root, report), named


def _pair(entry: Any, path: Path) -> tuple[str, str | None]:
    image = entry.get("image") if isinstance(entry, dict) else entry
    label = entry.get("label") if isinstance(entry, dict) else None
    if not isinstance(image, str) or not (label is None or isinstance(label, str)):
        problem = f"has the entry {shown(json.dumps(entry))[:80]}"
        raise FileFault(path, problem, "write image and label as paths of single files")
    return image, label


def _listed(root: Path, name: str, path: Path) -> Path:
    """Return a listed file; the Decathlon leaves out the compression in some lists."""
    parts = PurePosixPath(name)
    if "\0" in name or parts.is_absolute() or ".." in parts.parts:
        problem = f"names the file {shown(name)}, which leads out of the data folder"
        raise FileFault(path, problem, "list paths inside the folder")
    found = root / parts
    zipped = found.with_name(found.name + ".gz")
    return inside(root, zipped if not found.exists() and zipped.exists() else found)


def _without_channel(
    root: Path, images: dict[str, Path], labels: dict[str, Path]
) -> dict[str, Path]:
    """Drop nnU-Net's channel suffix `_0000` where all images and no label have one."""
    numbered = all(_CHANNEL.search(name) for name in images)
    if not numbered or any(_CHANNEL.search(name) for name in labels):
        return images
    if not labels and len(images) > 1 and len({name[:-5] for name in images}) == 1:
        return images  # a numbered series, not channels
    channels = sorted({name[-4:] for name in images})
    if channels == ["0000"]:
        return {name[:-5]: path for name, path in images.items()}
    if labels and {name[:-5] for name in images} & set(labels):
        problem = f"has images of {len(channels)} channels ({', '.join(channels)})"
        raise FileFault(root, problem, "keep one channel: images that end in _0000")
    return images


def readable(path: Path) -> bool:
    """Tell whether a regular file is there, without opening it."""
    return path.is_file() and os.access(path, os.R_OK)
