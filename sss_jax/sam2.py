"""SAM-2 for notebooks: load converted weights, segment images and volumes from a few prompts.

    network = sam2.load("weights/tiny")
    found = sam2.predict_image(network, image, boxes=[[20, 30, 90, 120]])
    prompt = sam2.Prompt(slice=12, box=(20, 30, 90, 120))
    found = sam2.predict_volume(network, volume, {1: [prompt]})

Coordinates are pixels of the image as it was given, (x right, y down), and are scaled to the
network's square as SAM 2 scales them.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from sss_jax.axes import PyTree
from sss_jax.data.examples import resize_plane
from sss_jax.data.resize import resize_image, resize_matrix
from sss_jax.errors import DataError
from sss_jax.models import tracking
from sss_jax.models.image_encoder import Features, normalise_image
from sss_jax.models.layers import padded_size
from sss_jax.models.presets import preset
from sss_jax.models.prompt_encoder import BOX_END, BOX_START, PADDING, Prompts
from sss_jax.models.sam2 import Sam2

SLICE_BUCKET = 16
"""Volumes are padded to a multiple of this many slices, so that few lengths are compiled."""


class Network(NamedTuple):
    """A SAM-2 network with its weights."""

    model: Sam2
    params: PyTree

    @property
    def size(self) -> int:
        """Side of the square input, pixels."""
        return self.model.config.image_size


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

    def tokens(self) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Points and labels as the prompt encoder takes them: the box's corners first."""
        corners = [] if self.box is None else [self.box[:2], self.box[2:]]
        kinds = [BOX_START, BOX_END][: len(corners)]
        clicks = [1] * len(self.points) if self.labels is None else [*self.labels]
        points = np.array([*corners, *self.points], np.float32).reshape(-1, 2)
        return points, np.array([*kinds, *clicks], np.int32)


class ImagePrediction(NamedTuple):
    """Masks of K objects on an image of its own size.

    Attributes:
        masks: True inside, [K, M, H, W]; M is 1, or 3 with `multimask`.
        logits: the same before the threshold 0, [K, M, H, W].
        iou: estimated intersection over union, [K, M].
        object_score: logit that the object is there, [K].
    """

    masks: NDArray[np.bool_]
    logits: NDArray[np.float32]
    iou: NDArray[np.float32]
    object_score: NDArray[np.float32]


class VolumePrediction(NamedTuple):
    """Masks of K objects on every slice.

    Attributes:
        logits: before the threshold 0, [S, K, H, W], float16 to save memory.
        object_score: logit that the object is in the slice, [S, K].
        objects: names of the objects, in the order of K.
    """

    logits: NDArray[np.float16]
    object_score: NDArray[np.float32]
    objects: tuple[int, ...]

    def label(self) -> NDArray[np.int32]:
        """Label map [S, H, W]: the object with the largest logit above 0, else 0."""
        best = self.logits.argmax(axis=1)
        names = np.array(self.objects, np.int32)[best]
        return np.where(self.logits.max(axis=1) > 0, names, 0).astype(np.int32)


def load(folder: str | Path, *, image_size: int = 1024, dtype: str = "float32") -> Network:
    """Load weights that `sss-jax convert` wrote.

    Args:
        folder: converted weights.
        image_size: side of the square that images are resized to, a multiple of 32 pixels.
        dtype: computation type, "float32" or "bfloat16".

    Raises:
        CheckpointError: the folder is missing or damaged.
        ConfigError: the network cannot run at this size.
    """
    from sss_jax.conversion import sam2 as conversion

    info, params = conversion.load(Path(folder))
    config = preset(info.variant, image_size, dtype, version=info.version)
    return Network(Sam2(config), jax.device_put(params))


def encode_image(network: Network, image: ArrayLike) -> Features:
    """Encode one image, so that many prompts can be tried on it.

    Args:
        network: the network.
        image: [H, W] or [H, W, 3]; integers 0..255 or floats in [0, 1].
    """
    return _encode(network.model, network.params, _square(np.asarray(image), network.size)[None])


def predict_image(
    network: Network,
    image: ArrayLike,
    *,
    boxes: ArrayLike | None = None,
    points: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    masks: ArrayLike | None = None,
    multimask: bool = False,
    features: Features | None = None,
) -> ImagePrediction:
    """Segment K objects of an image, each from its own prompt.

    Args:
        network: the network.
        image: as for `encode_image`; only its size matters where `features` are given.
        boxes: [K, 4] as (x0, y0, x1, y1), pixels.
        points: [K, Q, 2] as (x, y), pixels.
        labels: [K, Q]; 1 on the object, 0 beside it, -1 unused; all 1 by default.
        masks: [K, h, w] logits of an earlier prediction, at a quarter of the network's size.
        multimask: return the three candidates of an ambiguous prompt.
        features: result of `encode_image`.

    Raises:
        DataError: prompts that do not fit together.
    """
    image = np.asarray(image)
    if features is None:
        features = encode_image(network, image)
    prompts = _image_prompts(boxes, points, labels, masks)
    scaled = _scaled(prompts.points_BKQ2, image.shape[:2], network.size)
    low = None if masks is None else jnp.asarray(masks, jnp.float32)[None]
    output = _decode(network.model, network.params, features, scaled, prompts.labels_BKQ, low)
    pick = slice(1, None) if multimask else slice(0, 1)
    logits = np.asarray(output.logits_BKMHW[0, :, pick])
    full = _to_size(logits, image.shape[:2])
    iou = np.asarray(output.iou_BKM[0, :, pick])
    return ImagePrediction(full > 0, full, iou, np.asarray(output.object_score_BK[0]))


def predict_volume(
    network: Network, volume: ArrayLike, prompts: Mapping[int, Sequence[Prompt]]
) -> VolumePrediction:
    """Segment objects through a volume from prompts on a few slices, by SAM-2's memory.

    Args:
        network: the network.
        volume: [S, H, W], integers 0..255 or floats in [0, 1].
        prompts: for each object (its label, from 1 on) what is known of it.

    Raises:
        DataError: no prompt, or one outside the volume.
    """
    volume = np.asarray(volume)
    _check_prompts(prompts, volume.shape)
    objects = tuple(prompts)
    square = np.stack([_square(image, network.size) for image in volume])
    missing = padded_size(len(square), SLICE_BUCKET) - len(square)
    square = np.pad(square, ((0, missing), *[(0, 0)] * 3))
    prompted = _prompt_slices(network, square, [prompts[k] for k in objects], volume.shape[1:])
    start = min(p.slice for group in prompts.values() for p in group)
    track = _propagate(
        network.model,
        network.params,
        prompted,
        square,
        jnp.int32(start),
        jnp.int32(len(volume)),
    )
    low = np.asarray(track.logits_SKHW[: len(volume)])
    logits = np.stack([_to_size(one, volume.shape[1:]).astype(np.float16) for one in low])
    return VolumePrediction(logits, np.asarray(track.score_SK[: len(volume)]), objects)


def _check_prompts(prompts: Mapping[int, Sequence[Prompt]], shape: tuple[int, ...]) -> None:
    if len(shape) != 3:
        raise DataError(f"a volume has three axes [slice, row, column], this one has {len(shape)}")
    if not prompts or not all(len(group) for group in prompts.values()):
        raise DataError("every object needs at least one prompt")
    for name, group in prompts.items():
        slices = [p.slice for p in group]
        outside = [s for s in slices if not 0 <= s < shape[0]]
        if outside:
            raise DataError(f"object {name}: slice {outside[0]} is outside 0..{shape[0] - 1}")
        if len(set(slices)) < len(slices):
            raise DataError(f"object {name}: put all points of a slice into one prompt")


def _prompt_slices(
    network: Network,
    square: NDArray[np.float32],
    groups: list[Sequence[Prompt]],
    plane: tuple[int, ...],
) -> tracking.Prompted:
    """Prompt slice by slice, all objects of a slice at once."""
    model, params = network.model, network.params
    side = network.size // model.config.strides[2]
    slots = max(len(group) for group in groups)
    state = tracking.nothing_prompted(model, (side, side), len(groups), slots)
    wide = max(1, *(len(p.tokens()[1]) for group in groups for p in group))
    for index in sorted({p.slice for group in groups for p in group}):
        here = [next((p for p in group if p.slice == index), None) for group in groups]
        features = _encode(model, params, square[index][None])
        at = jnp.int32(index)
        drawn = [p is not None and p.mask is not None for p in here]
        pointed = [p is not None and p.mask is None for p in here]
        if any(pointed):
            state = _prompt(model, params, state, features, at, _padded(here, wide, plane, network))
        if any(drawn):
            masks = np.stack([_square_mask(p, network.size) for p in here])[None]
            state = _adopt(model, params, state, features, at, masks, np.array([drawn]))
    return state


def _padded(
    here: list[Prompt | None], wide: int, plane: tuple[int, ...], network: Network
) -> Prompts:
    points = np.zeros((1, len(here), wide, 2), np.float32)
    labels = np.full((1, len(here), wide), PADDING, np.int32)
    for k, prompt in enumerate(here):
        if prompt is not None and prompt.mask is None:
            xy, kinds = prompt.tokens()
            points[0, k, : len(kinds)], labels[0, k, : len(kinds)] = xy, kinds
    return Prompts(jnp.asarray(_scaled(points, plane, network.size)), jnp.asarray(labels))


def _square_mask(prompt: Prompt | None, size: int) -> NDArray[np.float32]:
    if prompt is None or prompt.mask is None:
        return np.zeros((size, size), np.float32)
    mask = np.asarray(prompt.mask).astype(np.uint8)
    return resize_plane(mask[None], size, "stretch")[0].astype(np.float32)


def _image_prompts(boxes: Any, points: Any, labels: Any, masks: Any) -> Prompts:
    if boxes is None and points is None and masks is None:
        raise DataError("give boxes, points or masks")
    counts = {len(np.asarray(x)) for x in (boxes, points, masks) if x is not None}
    if len(counts) > 1:
        raise DataError(f"boxes, points and masks are of different numbers of objects: {counts}")
    objects = counts.pop()
    parts = [(np.zeros((objects, 0, 2), np.float32), np.zeros((objects, 0), np.int32))]
    if boxes is not None:
        corners = np.asarray(boxes, np.float32).reshape(objects, 2, 2)
        kinds = np.array([BOX_START, BOX_END], np.int32)
        parts.append((corners, np.broadcast_to(kinds, (objects, 2))))
    if points is not None:
        clicks = np.asarray(points, np.float32).reshape(objects, -1, 2)
        given = np.ones(clicks.shape[:2]) if labels is None else np.asarray(labels)
        if given.shape != clicks.shape[:2]:
            raise DataError(f"labels have shape {given.shape}, points {clicks.shape}")
        parts.append((clicks, given.astype(np.int32)))
    merged = [np.concatenate(column, axis=1)[None] for column in zip(*parts, strict=True)]
    return Prompts(*(jnp.asarray(column) for column in merged))


def _scaled(points: Any, plane: tuple[int, ...], size: int) -> NDArray[np.float32]:
    """Pixels of an image as pixels of the square that it is stretched to."""
    factor = np.array([size / plane[1], size / plane[0]], np.float32)
    return (np.asarray(points) * factor).astype(np.float32)


def _square(image: NDArray[Any], size: int) -> NDArray[np.float32]:
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


def _to_size(planes: NDArray[np.float32], size: tuple[int, ...]) -> NDArray[np.float32]:
    """Resize planes [..., h, w] bilinearly."""
    *lead, height, width = planes.shape
    flat = np.ascontiguousarray(planes.reshape(-1, height, width), np.float32)
    into = resize_matrix(height, size[0]), resize_matrix(width, size[1])
    return resize_image(flat, *into).reshape(*lead, *size[:2])


@functools.partial(jax.jit, static_argnums=0)
def _encode(model: Sam2, params: PyTree, image_BHWC: Any) -> Any:
    standard = normalise_image(image_BHWC).astype(model.config.compute_dtype)
    return model.apply({"params": params}, standard, method="encode_image")


@functools.partial(jax.jit, static_argnums=0)
def _decode(model: Sam2, params: PyTree, features: Any, points: Any, labels: Any, low: Any) -> Any:
    return model.apply({"params": params}, features, points, labels, None, low, method="decode")


@functools.partial(jax.jit, static_argnums=0)
def _prompt(model: Sam2, params: PyTree, state: Any, features: Any, at: Any, prompts: Any) -> Any:
    return tracking.prompt_slice(model, params, state, features, at, prompts)[0]


@functools.partial(jax.jit, static_argnums=0)
def _adopt(
    model: Sam2, params: PyTree, state: Any, features: Any, at: Any, masks: Any, where: Any
) -> Any:
    return tracking.prompt_mask(model, params, state, features, at, masks, where)[0]


@functools.partial(jax.jit, static_argnums=0)
def _propagate(
    model: Sam2, params: PyTree, prompted: Any, image_SHWC: Any, start: Any, count: Any
) -> Any:
    standard = normalise_image(image_SHWC).astype(model.config.compute_dtype)
    return tracking.propagate(model, params, prompted, standard, start, count)
