"""What a prepared folder says of itself: `prepared.json`, and the names of its files.

File names follow from numbers and are never read from the manifest, so no manifest can lead out of
the folder.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from sss_jax.atomic import write_json
from sss_jax.data.faults import FileFault
from sss_jax.data.folders import PREPARED, read_json
from sss_jax.data.geometry import Frame
from sss_jax.options import DataOptions

PREPARING = "preparing.json"
"""The manifest of a folder that is not finished."""

FORMAT = 1
_MAX_MANIFEST = 2**31
_REMOVE = "remove the folder and prepare it again"
_ENDS = {
    "percentile": ("percentile_low", "percentile_high"),
    "window": ("window_low", "window_high"),
    "min_max": (),
}


@dataclasses.dataclass(frozen=True)
class Origin:
    """A source file: its path below the data folder and the SHA-256 of its bytes."""

    file: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class ImageFacts:
    """What reading the slices of an image needs.

    Attributes:
        first: number of its first record in the shard.
        dtype: type of the stored numbers.
        low: intensity that becomes 0.
        high: intensity that becomes 1.
        origin: where it came from.
    """

    first: int
    dtype: str
    low: float
    high: float
    origin: Origin


@dataclasses.dataclass(frozen=True)
class LabelFacts:
    """What drawing and reading labelled slices needs.

    Attributes:
        first: number of its first record in the shard of labels.
        present: the labels that occur, without the background.
        slices: slices that show any of them, ascending.
        origin: where it came from.
    """

    first: int
    present: tuple[int, ...]
    slices: tuple[int, ...]
    origin: Origin


@dataclasses.dataclass(frozen=True)
class CaseFacts:
    """One case of a shard.

    Attributes:
        name: case name.
        subject: the person it shows.
        frame: how the stored volume became slices.
        affine: voxel indices of the stored volume to mm, row by row.
        oriented: whether the file gave an orientation.
        image: its image.
        label: its labels, None where there are none or where they were not to be read.
    """

    name: str
    subject: str
    frame: Frame
    affine: tuple[tuple[float, ...], ...]
    oriented: bool
    image: ImageFacts
    label: LabelFacts | None


@dataclasses.dataclass(frozen=True)
class FileFacts:
    """A file of records: bytes, SHA-256, number of records."""

    bytes: int
    sha256: str
    records: int


@dataclasses.dataclass(frozen=True)
class ShardFacts:
    """A file of images, the file of their labels if any has some, and their cases in order."""

    images: FileFacts
    labels: FileFacts | None
    cases: tuple[CaseFacts, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of a prepared folder; `shards` has None where one is still to be written."""

    settings: dict[str, Any]
    shards: tuple[ShardFacts | None, ...]


def baked(options: DataOptions) -> dict[str, Any]:
    """Return the settings that the records depend on; all others stay free."""
    names = ("slice_axis", "normalise", *_ENDS[options.normalise])
    return {name: getattr(options, name) for name in names}


def differing(settings: dict[str, Any], options: DataOptions) -> str:
    """Return in words how baked-in settings differ from a configuration's; empty if they do not."""
    now = {name: getattr(options, name, None) for name in settings}
    return ", ".join(
        f"data.{name}={was!r} (the configuration says {now[name]!r})"
        for name, was in settings.items()
        if was != now[name]
    )


def images_name(index: int, count: int) -> str:
    """Return the file name of a shard of images."""
    return f"images-{index:05d}-of-{count:05d}.array_record"


def labels_name(index: int, count: int) -> str:
    """Return the file name of a shard of labels."""
    return f"labels-{index:05d}-of-{count:05d}.array_record"


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest with its own checksum, atomically; equal manifests give equal bytes."""
    content = {"format": FORMAT, **dataclasses.asdict(manifest)}
    write_json(path, {**content, "sha256": _digest(content)}, indent=None)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        FileFault: missing, damaged, edited, or of another version.
    """
    content = read_json(path, _MAX_MANIFEST)
    if content.get("format") != FORMAT:
        problem = f"has the format {content.get('format')!r}, this version reads {FORMAT}"
        raise FileFault(path, problem, _REMOVE)
    known = content.pop("sha256", None)
    if known != _digest(content):
        raise FileFault(path, "is damaged or was edited: its checksum differs", _REMOVE)
    try:
        shards = tuple(None if s is None else _shard(s) for s in content["shards"])
        return Manifest(dict(content["settings"]), shards)
    except (KeyError, TypeError, ValueError) as error:
        raise FileFault(path, f"is no manifest of this package ({error})", _REMOVE) from error


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _shard(content: dict[str, Any]) -> ShardFacts:
    labels = content["labels"]
    return ShardFacts(
        FileFacts(**content["images"]),
        None if labels is None else FileFacts(**labels),
        tuple(_case(case) for case in content["cases"]),
    )


def _case(content: dict[str, Any]) -> CaseFacts:
    label = content["label"]
    changed = {
        "frame": _frame(content["frame"]),
        "affine": tuple(tuple(float(x) for x in row) for row in content["affine"]),
        "image": ImageFacts(**_with_origin(content["image"])),
        "label": None if label is None else _label(label),
    }
    return CaseFacts(**{**content, **changed})


def _frame(content: dict[str, Any]) -> Frame:
    (x, y, z), (s, h, w) = content["shape"], content["axes"]
    (flip_s, flip_h, flip_w), (apart_s, apart_h, apart_w) = content["flips"], content["spacing"]
    flips, spacing = (flip_s, flip_h, flip_w), (apart_s, apart_h, apart_w)
    return Frame((x, y, z), (s, h, w), flips, spacing, content["slice_axis"])


def _label(content: dict[str, Any]) -> LabelFacts:
    lists = {name: tuple(int(x) for x in content[name]) for name in ("present", "slices")}
    return LabelFacts(**{**_with_origin(content), **lists})


def _with_origin(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "origin": Origin(**content["origin"])}


def is_prepared(root: Path) -> bool:
    """Tell whether a folder holds a finished preparation."""
    return (root / PREPARED).is_file()
