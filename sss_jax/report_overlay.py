"""Pictures of single cases: the image beside its reference and predicted contours."""

import base64
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sss_jax.data.folders import Case
from sss_jax.data.geometry import make_frame, turn
from sss_jax.data.nifti import read_labels, read_volume
from sss_jax.errors import DataError
from sss_jax.options import DataOptions
from sss_jax.png import grey_png
from sss_jax.report_svg import color

_MARGIN = 0.35  # of the labelled region's longer side, on each side
# Names of the left and the upper edge of a slice cut along right, front, head.
_EDGES = (("A", "S"), ("R", "S"), ("R", "A"))

Image = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class View:
    """One slice of a case, cropped.

    Attributes:
        caption: which slice it is and why it was chosen.
        image: grey values, [rows, columns].
        reference: labels.
        prediction: labels.
        spacing: height and width of a pixel, mm or in relation to each other.
        edges: what lies beyond the left and the upper edge; empty where that is unknown.
    """

    caption: str
    image: Image
    reference: NDArray[np.uint8]
    prediction: NDArray[np.uint8]
    spacing: tuple[float, float]
    edges: tuple[str, str]


def case_views(case: Case, prediction_path: Any, slice_axis: int = -1) -> list[View]:
    """Read a case and choose two slices: of most disagreement and of the largest object.

    Raises:
        DataError: a file is missing, damaged or on another grid.
    """
    limit = DataOptions.max_voxels
    if case.label is None:
        raise DataError(f"{case.name} has no reference labels")
    image = read_volume(case.image, limit)
    reference = read_labels(case.label, None, limit, like=image)
    prediction = read_labels(prediction_path, None, limit, like=image)
    frame = make_frame(image, slice_axis)
    volume, truth, guess = (turn(v.array, frame) for v in (image, reference, prediction))
    low, high = np.percentile(volume, (0.5, 99.5))
    rows, columns = _crop(np.any((truth > 0) | (guess > 0), axis=0), frame.spacing[1:])
    edges = _EDGES[frame.slice_axis] if image.oriented else ("", "")
    views = []
    for number, reason in _choose(truth, guess):
        at = (number, rows, columns)
        grey = np.clip((volume[at] - low) / max(high - low, 1e-12), 0.0, 1.0)
        caption = f"Slice {number + 1} of {len(volume)}: {reason}"
        picture = np.round(grey * 255).astype(np.uint8)
        views.append(View(caption, picture, truth[at], guess[at], frame.spacing[1:], edges))
    return views


def _choose(truth: NDArray[np.uint8], guess: NDArray[np.uint8]) -> list[tuple[int, str]]:
    """Return two slices and why; one where the volume has no more."""
    wrong = (truth != guess).sum(axis=(1, 2))
    size = ((truth > 0) | (guess > 0)).sum(axis=(1, 2))
    worst, fullest = int(np.argmax(wrong)), int(np.argmax(size))
    if wrong[worst] == 0:
        return [(fullest, "largest object; no disagreement in any slice")]
    first = (worst, f"most disagreement ({wrong[worst]:,} pixels)")
    if worst != fullest:
        return [first, (fullest, f"largest object ({wrong[fullest]:,} pixels disagree)")]
    first = (worst, f"most disagreement ({wrong[worst]:,} pixels) and largest object")
    wrong[worst] = -1
    second = int(np.argmax(wrong))
    if wrong[second] <= 0:
        return [first]
    return [first, (second, f"second most disagreement ({wrong[second]:,} pixels)")]


def _crop(labelled: NDArray[np.bool_], spacing: tuple[float, float]) -> tuple[slice, slice]:
    """Return rows and columns of a square around everything labelled, within the slice."""
    if not labelled.any():
        return slice(0, labelled.shape[0]), slice(0, labelled.shape[1])
    spans = []
    for axis in (0, 1):
        at = np.flatnonzero(labelled.any(axis=1 - axis))
        spans.append((int(at[0]), int(at[-1]) + 1))
    side = max((high - low) * s for (low, high), s in zip(spans, spacing, strict=True))
    side *= 1 + 2 * _MARGIN
    kept = []
    for (low, high), s, size in zip(spans, spacing, labelled.shape, strict=True):
        length = min(size, max(round(side / s), high - low))
        start = min(max(0, (low + high - length) // 2), size - length)
        kept.append(slice(start, start + length))
    return kept[0], kept[1]


def contour_path(mask: NDArray[np.bool_]) -> str:
    """Return the outline of a mask as SVG path data, in pixels.

    Corners lie at the middles of pixel edges, as in marching squares; holes are outlined too.
    """
    following = _boundary_edges(np.pad(mask, 1))
    loops = []
    while following:
        start = next(iter(following))
        loop, at = [start], start
        while True:
            ends = following[at]
            step = ends.pop()
            if not ends:
                del following[at]
            at = step
            if at == start:
                break
            loop.append(at)
        loops.append(_simplify(loop))
    # Halves of pixels; one more pixel of padding is taken off here.
    return "".join(
        "M" + "L".join(f"{x / 2 - 1:g} {y / 2 - 1:g}" for x, y in loop) + "Z" for loop in loops
    )


def _boundary_edges(
    padded: NDArray[np.bool_],
) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Return the directed pixel edges around a mask, object on the right: start to ends."""
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}
    sides = (
        ((-1, 0), (0, 0), (1, 0)),
        ((0, 1), (1, 0), (1, 1)),
        ((1, 0), (1, 1), (0, 1)),
        ((0, -1), (0, 1), (0, 0)),
    )
    for (dr, dc), (sx, sy), (ex, ey) in sides:
        open_side = padded & ~np.roll(padded, (-dr, -dc), axis=(0, 1))
        for r, c in np.argwhere(open_side).tolist():
            following.setdefault((c + sx, r + sy), []).append((c + ex, r + ey))
    return following


def _simplify(corners: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the middles of a loop's edges, doubled to stay whole, without points on a line."""
    ends = [*corners[1:], corners[0]]
    middles = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(corners, ends, strict=True)]
    kept = []
    for i, here in enumerate(middles):
        before, after = middles[i - 1], middles[(i + 1) % len(middles)]
        cross = (here[0] - before[0]) * (after[1] - here[1]) - (here[1] - before[1]) * (
            after[0] - here[0]
        )
        if cross:
            kept.append(here)
    return kept


def view_html(view: View, identity: str, classes: Sequence[int]) -> str:
    """Return three panels of a slice: image, reference, prediction.

    Args:
        view: the slice.
        identity: unique HTML id for the picture, which is stored once.
        classes: labels to outline.
    """
    content = base64.b64encode(grey_png(view.image)).decode()
    rows, columns = view.image.shape
    height, width = rows * view.spacing[0], columns * view.spacing[1]
    size = f'width="{columns}" height="{rows}"'
    picture = f'<image id="{identity}" {size} href="data:image/png;base64,{content}"/>'
    panels = (
        ("Image", picture),
        ("Reference", f'<use href="#{identity}"/>' + _outlines(view.reference, classes)),
        ("Prediction", f'<use href="#{identity}"/>' + _outlines(view.prediction, classes)),
    )
    # Panels are drawn in pixels and stretched to the true proportions of the slice.
    ratio = f"{width / height:.4f}"
    left, top = (f"<b>{edge}</b>" if edge else "" for edge in view.edges)
    letters = f'<span class="left">{left}</span><span class="top">{top}</span>'
    drawn = "".join(
        f'<div class="panel"><div class="frame" style="aspect-ratio:{ratio}">'
        f'<svg viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" role="img" '
        f'aria-label="{name}">{body}</svg>{letters}</div><span>{name}</span></div>'
        for name, body in panels
    )
    return (
        f'<figure class="view"><div class="panels">{drawn}</div>'
        f"<figcaption>{view.caption}</figcaption></figure>"
    )


def _outlines(labels: NDArray[np.uint8], classes: Sequence[int]) -> str:
    return "".join(
        f'<path class="outline" style="--s:{color(k)}" d="{contour_path(labels == k)}"/>'
        for k in classes
        if (labels == k).any()
    )
