"""SAM-2 for notebooks: load converted weights, segment images and volumes from a few prompts.

    network = sam2.load("weights/tiny")
    found = sam2.predict_image(network, image, boxes=[[20, 30, 90, 120]])
    prompt = sam2.Prompt(slice=12, box=(20, 30, 90, 120))
    found = sam2.predict_volume(network, volume, {1: [prompt]})

Coordinates are pixels of the image as it was given, (x right, y down), and are scaled to the
network's square as SAM 2 scales them.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from sss_jax import compiling
from sss_jax.axes import PyTree
from sss_jax.errors import DataError
from sss_jax.models.image_encoder import Features
from sss_jax.models.prompt_encoder import BOX_END, BOX_START, Prompts
from sss_jax.models.sam2 import Sam2
from sss_jax.sam2_inputs import Prompt, scaled, to_size
from sss_jax.sam2_interactive import SlicePrediction, VolumePredictor
from sss_jax.sam2_network import Network, encode_image, load
from sss_jax.sam2_volume import VolumePrediction, predict_volume

__all__ = [
    "ImagePrediction",
    "Network",
    "Prompt",
    "SlicePrediction",
    "VolumePrediction",
    "VolumePredictor",
    "encode_image",
    "load",
    "predict_image",
    "predict_volume",
]


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
    where = scaled(prompts.points_BKQ2, image.shape[:2], network.size)
    low = None if masks is None else jnp.asarray(masks, jnp.float32)[None]
    output = _decode(network.model, network.params, features, where, prompts.labels_BKQ, low)
    pick = slice(1, None) if multimask else slice(0, 1)
    logits = np.asarray(output.logits_BKMHW[0, :, pick])
    full = to_size(logits, image.shape[:2])
    iou = np.asarray(output.iou_BKM[0, :, pick])
    return ImagePrediction(full > 0, full, iou, np.asarray(output.object_score_BK[0]))


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


@functools.partial(compiling.jit, static_argnums=0)
def _decode(model: Sam2, params: PyTree, features: Any, points: Any, labels: Any, low: Any) -> Any:
    return model.apply({"params": params}, features, points, labels, None, low, method="decode")
