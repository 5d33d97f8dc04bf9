"""Inference on a whole volume: coarse masks, PCSW prompts, masks; no labels, no clicks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sss_jax.axes import Array, Bool, Float, PyTree
from sss_jax.data.examples import Example, restore_labels
from sss_jax.losses import upsample_logits
from sss_jax.models.layers import padded_size
from sss_jax.models.mask_decoder import Skips
from sss_jax.models.sss import SegmentOutput, SSSModel
from sss_jax.options import Options
from sss_jax.ssl.network import Network
from sss_jax.ssl.pcsw import clip_prompts
from sss_jax.ssl.prompts import ClipPrompts
from sss_jax.ssl.propagation import carry_classes
from sss_jax.ssl.self_sorting import ImageBank, Recall, segment_images


class VolumeOutput(NamedTuple):
    """What the network makes of a volume, on its square input grid.

    Attributes:
        probability_SHWK1: probability of background and classes.
        box_SK4: box prompt of each class on a slice: inclusive corners (x0, y0, x1, y1), pixels; 0
            where there is none.
        prompted_SK: slices that carry a prompt of the class; none do where `pcsw.enabled` is false.
    """

    probability_SHWK1: Float[Array, "S H W K1"]
    box_SK4: Float[Array, "S K 4"]
    prompted_SK: Bool[Array, "S K"]


VolumeFunction = Callable[[PyTree, Any, Any], VolumeOutput]


def make_volume_function(model: SSSModel, options: Options) -> VolumeFunction:
    """Return a jitted `(params, image_SHW1, slice_mask_S) -> VolumeOutput`.

    `params` are those of the network; with `memory.kind=self_sorting` {"net": those, "bank": the
    bank of the train state}.

    Pass one encodes the slices and makes the coarse masks, PCSW turns the masks of the whole
    volume into prompts, pass two carries every class by memory from its prompt through the volume
    (without memory, or with that of other images, it decodes every slice by itself). What the
    decoder needs of the features is kept between the passes while it fits `eval.keep_bytes`, else
    computed again, with memory once for each class. S must be a multiple of `eval.encode_batch` or
    smaller than it. With `eval.flip_average` the prompts are those of the view that is not flipped.
    """

    def one_view(params: PyTree, image: Array, mask: Array) -> VolumeOutput:
        return _segment_volume(model, params, image, mask, options)

    def averaged(params: PyTree, image: Array, mask: Array) -> VolumeOutput:
        flips = ((), (1,), (2,), (1, 2))
        views = [one_view(params, jnp.flip(image, f), mask) for f in flips]
        upright = [jnp.flip(v.probability_SHWK1, f) for v, f in zip(views, flips, strict=True)]
        return views[0]._replace(probability_SHWK1=jnp.stack(upright).mean(axis=0))

    return jax.jit(averaged if options.eval.flip_average else one_view)


class _Slices(NamedTuple):
    """The slices of a volume in chunks: what the decoder needs of them, or, kept short, images."""

    network: Network
    chunks: PyTree
    kept: bool

    def skips(self, held: PyTree) -> Skips:
        """Return what the decoder needs of some of the slices."""
        return held if self.kept else self.network.skips(self.network.encode(held))

    def one_by_one(self) -> PyTree:
        """Return all slices along one axis."""
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), self.chunks)


def _segment_volume(
    model: SSSModel,
    params: PyTree,
    image_SHWC: Float[Array, "S H W 1"],
    slice_mask_S: Bool[Array, " S"],
    options: Options,
) -> VolumeOutput:
    size = (image_SHWC.shape[1], image_SHWC.shape[2])
    by_images = options.memory.kind == "self_sorting"
    network = Network(model, params["net"] if by_images else params)
    slices, coarse = _first_pass(network, image_SHWC, options)
    mask_BS = slice_mask_S[None]
    prompts, _ = clip_prompts(coarse[None], mask_BS, size[1], options.pcsw)
    if options.memory.kind == "fifo":
        logits = _carried(slices, prompts, mask_BS, options)
    elif by_images:
        recall = Recall(ImageBank(**params["bank"]), options.memory.samples, None)
        logits = _one_by_one(
            slices, prompts, lambda skips, part: segment_images(network, skips, part, recall)[0]
        )
    else:
        logits = _one_by_one(
            slices, prompts, lambda skips, part: network.segment(skips, part.images())
        )
    probability = jax.lax.map(lambda x: _probability(x[None], size)[0], logits)
    return VolumeOutput(probability, *(x_BS[0] for x_BS in prompts.boxes()))


def _first_pass(
    network: Network, image_SHWC: Array, options: Options
) -> tuple[_Slices, Float[Array, "S h w K"]]:
    """Encode all slices, chunk by chunk, and make the coarse masks."""
    chunk = min(options.eval.encode_batch, len(image_SHWC))
    images = image_SHWC.reshape(-1, chunk, *image_SHWC.shape[1:])
    shapes = jax.eval_shape(lambda image: network.skips(network.encode(image)), images[0])
    size = sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(shapes)) * images.shape[0]
    keep = size <= options.eval.keep_bytes

    def encode(image: Array) -> tuple[Array, PyTree]:
        features = network.encode(image)
        return network.coarse_foreground(features), network.skips(features) if keep else image

    coarse, stored = jax.lax.map(encode, images)
    return _Slices(network, stored, keep), coarse.reshape(-1, *coarse.shape[2:])


def _carried(slices: _Slices, prompts: ClipPrompts, mask_BS: Array, options: Options) -> Array:
    """Carry every class by memory from its prompt through the volume."""
    stored = slices.one_by_one()

    def skips_of(slice_BK: Array) -> Skips:
        return slices.skips(jax.tree.map(lambda x: x[slice_BK[0]], stored))

    return carry_classes(slices.network, skips_of, prompts, mask_BS, options).logits_BHWK1


def _one_by_one(
    slices: _Slices,
    prompts: ClipPrompts,
    segment: Callable[[Skips, ClipPrompts], SegmentOutput],
) -> Array:
    """Decode every slice by itself, chunk by chunk."""
    first = jax.tree.leaves(slices.chunks)[0]
    points, labels = (x[0].reshape(*first.shape[:2], *x.shape[2:]) for x in prompts[:2])

    def decode(part: tuple[PyTree, Array, Array]) -> Array:
        held, own_points, own_labels = part
        clip = ClipPrompts(own_points[None], own_labels[None], prompts.start_BK)
        return segment(slices.skips(held), clip).logits_BHWK1

    logits = jax.lax.map(decode, (slices.chunks, points, labels))
    return logits.reshape(-1, *logits.shape[2:])


def _probability(logits_NhwK1: Array, size: tuple[int, int]) -> Float[Array, "N H W K1"]:
    return jax.nn.softmax(upsample_logits(logits_NhwK1, size))


def predict_example(
    function: VolumeFunction, params: PyTree, example: Example, options: Options
) -> np.ndarray:
    """Return the class of every voxel of a prepared volume, on the stored grid, as uint8."""
    output = predict_volume(function, params, example, options)
    return restore_labels(np.asarray(output.probability_SHWK1), example.placement)


def predict_volume(
    function: VolumeFunction, params: PyTree, example: Example, options: Options
) -> VolumeOutput:
    """Return what the network makes of every slice of a prepared volume, as NumPy arrays."""
    image, mask = pad_slices(example.image_SHW, options)
    output = jax.device_get(function(params, image, mask))
    return VolumeOutput(*(x_S[: len(example.image_SHW)] for x_S in output))


def pad_slices(image_SHW: np.ndarray, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Pad a volume to a multiple of `eval.slice_bucket`, so that few shapes are compiled."""
    slices = len(image_SHW)
    total = padded_size(slices, options.eval.slice_bucket)
    total = padded_size(total, min(options.eval.encode_batch, total))
    padded = np.pad(image_SHW, ((0, total - slices), (0, 0), (0, 0)))
    return padded[..., None].astype(np.float32), np.arange(total) < slices
