"""Prompts and images as somebody gives them and as SAM-2 takes them; masks back to their size."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from sss_jax.data.examples import resize_plane
from sss_jax.data.resize import resize_image, resize_matrix
from sss_jax.errors import DataError
from sss_jax.models.prompt_encoder import BOX_END, BOX_START, PADDING, Prompts


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What somebody knows of an object on one slice: a box, points, or a mask.

    Attributes:
        slice: number of the slice.
        box: (x0, y0, x1, y1), pixels.
        points: (x, y) of clicks, pixels.
        labels: 1 for a click on the object, 0 beside it; all 1 by default.
        mask: True inside; the only prompt of its slice.
    """

    slice: int
    box: Sequence[float] | None = None
    points: Sequence[Sequence[float]] = ()
    labels: Sequence[int] | None = None
    mask: ArrayLike | None = None

    def __post_init__(self) -> None:
        """Refuse what is no prompt."""
        given = (self.box is not None) + bool(len(self.points)) + 2 * (self.mask is not None)
        if not given:
            raise DataError(f"slice {self.slice}: a prompt needs a box, points or a mask")
        if given > 2:
            raise DataError(f"slice {self.slice}: a mask takes no box or points beside it")
        if self.labels is not None and len(self.labels) != len(self.points):
            raise DataError(
                f"slice {self.slice}: {len(self.points)} points have {len(self.labels)} labels"
            )
        if self.labels is not None and not set(self.labels) <= {0, 1}:
            raise DataError(f"slice {self.slice}: a label is 1 on the object or 0 beside it")
        if not np.isfinite(self.tokens()[0]).all():
            raise DataError(f"slice {self.slice}: coordinates must be finite")

    def tokens(self) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Points and labels as the prompt encoder takes them: the box's corners first."""
        corners = [] if self.box is None else [self.box[:2], self.box[2:]]
        kinds = [BOX_START, BOX_END][: len(corners)]
        clicks = [1] * len(self.points) if self.labels is None else [*self.labels]
        points = np.array([*corners, *self.points], np.float32).reshape(-1, 2)
        return points, np.array([*kinds, *clicks], np.int32)


def padded(here: list[Prompt | None], wide: int, plane: tuple[int, ...], size: int) -> Prompts:
    """Points of all objects on a slice of this shape, with `wide` slots each."""
    points = np.zeros((1, len(here), wide, 2), np.float32)
    labels = np.full((1, len(here), wide), PADDING, np.int32)
    for k, prompt in enumerate(here):
        if prompt is not None and prompt.mask is None:
            xy, kinds = prompt.tokens()
            points[0, k, : len(kinds)], labels[0, k, : len(kinds)] = xy, kinds
    return Prompts(jnp.asarray(scaled(points, plane, size)), jnp.asarray(labels))


def square_mask(prompt: Prompt | None, size: int) -> NDArray[np.float32]:
    """Stretch a prompt's mask to the square; 0 everywhere where there is none."""
    if prompt is None or prompt.mask is None:
        return np.zeros((size, size), np.float32)
    mask = np.asarray(prompt.mask).astype(np.uint8)
    return resize_plane(mask[None], size, "stretch")[0].astype(np.float32)


def scaled(points: Any, plane: tuple[int, ...], size: int) -> NDArray[np.float32]:
    """Pixels of an image as pixels of the square that it is stretched to."""
    factor = np.array([size / plane[1], size / plane[0]], np.float32)
    return (np.asarray(points) * factor).astype(np.float32)


def square(image: NDArray[Any], size: int) -> NDArray[np.float32]:
    """Stretch an image to the square, three channels, in [0, 1]."""
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise DataError(f"an image is [H, W] or [H, W, 3], not {list(image.shape)}")
    scale = 255.0 if image.dtype.kind in "iu" else 1.0
    image = np.asarray(image, np.float32) / np.float32(scale)
    if not np.isfinite(image).all() or image.min() < 0 or image.max() > 1:
        raise DataError("an image holds integers 0..255 or floats in [0, 1], nothing else")
    planes = image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)
    planes = resize_plane(planes, size, "stretch")
    return (
        np.repeat(planes[0][..., None], 3, -1) if len(planes) == 1 else np.moveaxis(planes, 0, -1)
    )


def to_size(planes: NDArray[np.float32], size: tuple[int, ...]) -> NDArray[np.float32]:
    """Resize planes [..., h, w] bilinearly."""
    *lead, height, width = planes.shape
    flat = np.ascontiguousarray(planes.reshape(-1, height, width), np.float32)
    into = resize_matrix(height, size[0]), resize_matrix(width, size[1])
    return resize_image(flat, *into).reshape(*lead, *size[:2])
