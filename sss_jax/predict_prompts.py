"""`sss-jax predict --prompts`: a NIfTI volume from a few prompts, by SAM-2's memory.

A prompt file names each object by its label:

    {"space": "voxel",
     "objects": {"1": [{"box": [[30, 41, 12], [58, 77, 12]]},
                       {"points": [[44, 60, 20], [70, 60, 20]], "labels": [1, 0]}],
                 "2": [{"mask": "drawn.nii.gz", "label": 2, "slices": [15]}]}}

Coordinates are the image's stored voxel indices, or with `"space": "world"` millimetres (RAS+). A
box lies on one slice. A mask is a label volume on the image's grid, beside the prompt file;
`slices` (default: all that hold `label`) counts along the axis that the image is cut along.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from sss_jax import sam2
from sss_jax.data.examples import scan
from sss_jax.data.folders import inside, read_json
from sss_jax.data.geometry import Frame, from_slices, turn
from sss_jax.data.nifti import Volume, read_labels, read_volume, refuse_other_grid, write_labels
from sss_jax.data.places import to_upright, to_voxels
from sss_jax.errors import ConfigError, DataError
from sss_jax.options import DataOptions

SPACES = ("voxel", "world")
_KEYS = {"box", "points", "labels", "mask", "label", "slices"}
_MAX_TEXT = 2**24
_MAX_LABEL = 255


def predict_prompted(
    network: sam2.Network,
    source: Path,
    prompts: Path,
    target: Path,
    options: DataOptions,
    *,
    clean_area: int = 0,
    overlap: bool = True,
) -> dict[str, Any]:
    """Segment a volume from a prompt file and write its label map on the image's grid.

    Args:
        network: SAM-2 with its weights.
        source: image, NIfTI.
        prompts: prompt file, JSON.
        target: label file to write.
        options: intensity scaling and slice axis.
        clean_area: as for `sam2.predict_volume`.
        overlap: as for `sam2.predict_volume`; labels never overlap, but what the network remembers
            of the objects on other slices may.

    Returns:
        JSON values: the file, and for each object its voxels and the slices that it is on.

    Raises:
        DataError: a damaged image or prompt file, or a target that exists; nothing is written.
    """
    if target.exists():
        raise DataError(f"{target} exists; choose another name or remove it")
    volume = read_volume(source, options.max_voxels)
    upright = scan(volume, None, options)
    given = read_prompts(prompts, volume, upright.frame, options)
    found = sam2.predict_volume(
        network, upright.image_SHW, given, clean_area=clean_area, overlap=overlap
    )
    label = found.label()
    stored = np.ascontiguousarray(from_slices(label.astype(np.uint8), upright.frame))
    write_labels(target, stored, volume)
    objects = {
        str(name): {
            "voxels": int((label == name).sum()),
            "slices": int((label == name).any(axis=(1, 2)).sum()),
        }
        for name in given
    }
    return {"target": str(target), "objects": objects}


def read_prompts(
    path: Path, volume: Volume, frame: Frame, options: DataOptions
) -> dict[int, list[sam2.Prompt]]:
    """Read a prompt file for a volume that is cut as `frame` says.

    Raises:
        DataError: not such a file, or prompts outside the volume.
    """
    content = read_json(path, _MAX_TEXT)
    space = content.get("space", "voxel")
    if space not in SPACES:
        raise DataError(f'{path}: "space" is {space!r}; use "voxel" or "world"')
    objects = content.get("objects")
    if not isinstance(objects, dict) or not objects:
        raise DataError(f'{path}: "objects" must name at least one object by its label')
    prompts = {}
    for name, entries in objects.items():
        where = f"{path}: object {name}"
        if not name.isdecimal() or not 0 < int(name) <= _MAX_LABEL:
            raise DataError(f"{where}: an object is named by its label, 1 to {_MAX_LABEL}")
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise DataError(f"{where}: its prompts must be a list of JSON objects")
        reader = _Reader(where, path.parent, volume, frame, options, space == "world")
        prompts[int(name)] = reader.read(entries)
    return prompts


class _Reader:
    """Turns the entries of one object into prompts, one per slice."""

    def __init__(
        self,
        where: str,
        folder: Path,
        volume: Volume,
        frame: Frame,
        options: DataOptions,
        world: bool,
    ) -> None:
        self.where, self.folder, self.volume = where, folder, volume
        self.frame, self.options, self.world = frame, options, world
        self.boxes: dict[int, list[float]] = {}
        self.clicks: dict[int, list[tuple[float, float, int]]] = defaultdict(list)
        self.masks: dict[int, np.ndarray] = {}

    def read(self, entries: list[dict[str, Any]]) -> list[sam2.Prompt]:
        for entry in entries:
            unknown = sorted(set(entry) - _KEYS)
            if unknown:
                known = ", ".join(sorted(_KEYS))
                raise DataError(f"{self.where}: unknown {unknown[0]!r}; known: {known}")
            if "mask" in entry:
                self._mask(entry)
            if "box" in entry:
                self._box(entry["box"])
            if "points" in entry:
                self._points(entry["points"], entry.get("labels"))
        slices = sorted({*self.boxes, *self.clicks, *self.masks})
        if not slices:
            raise DataError(f"{self.where}: no box, no points and no mask")
        return [self._prompt(index) for index in slices]

    def _prompt(self, index: int) -> sam2.Prompt:
        clicks = self.clicks.get(index, [])
        return sam2.Prompt(
            slice=index,
            box=self.boxes.get(index),
            points=[(x, y) for x, y, _ in clicks],
            labels=[label for _, _, label in clicks],
            mask=self.masks.get(index),
        )

    def _upright(self, coordinates: Any, count: int | None = None) -> np.ndarray:
        """Slice, row and column of coordinates as the file gives them."""
        try:
            array = np.array(coordinates, np.float64)
        except (TypeError, ValueError):
            array = np.zeros(0)
        if array.ndim != 2 or array.shape[1] != 3 or count not in (None, len(array)):
            number = "a list of" if count is None else str(count)
            raise DataError(f"{self.where}: expected {number} points [i, j, k], got {coordinates}")
        if not np.isfinite(array).all():
            raise DataError(f"{self.where}: a coordinate is not finite")
        voxels = to_voxels(array, self.volume.affine) if self.world else array
        shape = np.array(self.volume.array.shape)
        if ((voxels < -0.5) | (voxels > shape - 0.5)).any():
            raise DataError(
                f"{self.where}: {coordinates} lies outside the image of "
                f"{' x '.join(map(str, shape))} voxels"
            )
        return to_upright(voxels, self.frame)

    def _box(self, corners: Any) -> None:
        upright = self._upright(corners, 2)
        first, second = np.rint(upright[:, 0]).astype(int)
        if first != second:
            raise DataError(f"{self.where}: the corners of a box lie on two slices")
        if first in self.boxes:
            raise DataError(f"{self.where}: two boxes on slice {first}")
        low, high = upright[:, 1:].min(axis=0), upright[:, 1:].max(axis=0)
        self.boxes[int(first)] = [low[1], low[0], high[1], high[0]]

    def _points(self, points: Any, labels: Any) -> None:
        upright = self._upright(points)
        kinds = [1] * len(upright) if labels is None else labels
        if not isinstance(kinds, list) or len(kinds) != len(upright) or set(kinds) - {0, 1}:
            raise DataError(f'{self.where}: "labels" needs 1 or 0 for each of the points')
        for (index, y, x), kind in zip(upright, kinds, strict=True):
            self.clicks[round(index)].append((x, y, kind))

    def _mask(self, entry: dict[str, Any]) -> None:
        path = inside(self.folder, self.folder / str(entry["mask"]))
        labels = read_labels(path, _MAX_LABEL, self.options.max_voxels)
        refuse_other_grid(labels, path, self.volume)
        chosen = turn(labels.array, self.frame) == entry.get("label", 1)
        wanted = entry.get("slices", np.flatnonzero(chosen.any(axis=(1, 2))).tolist())
        if not wanted:
            raise DataError(f"{self.where}: {path.name} has no voxel of the label")
        for index in wanted:
            if not isinstance(index, int) or not 0 <= index < len(chosen):
                raise DataError(f"{self.where}: slice {index} is outside 0..{len(chosen) - 1}")
            self.masks[index] = np.ascontiguousarray(chosen[index])


def data_options(window: tuple[float, float] | None) -> DataOptions:
    """Intensity scaling of the command line: a CT window, or percentiles."""
    if window is None:
        return DataOptions()
    low, high = window
    if not low < high:
        raise ConfigError(f"--window {low:g} {high:g}: the first number must be the smaller")
    return DataOptions(normalise="window", window_low=low, window_high=high)
