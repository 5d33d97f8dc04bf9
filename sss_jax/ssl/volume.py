"""Inference on a whole volume: coarse masks, PCSW prompts, masks; no labels, no clicks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sss_jax.axes import Array, Bool, Float, PyTree
from sss_jax.data.examples import Example, restore_labels
from sss_jax.losses import upsample_logits
from sss_jax.models.layers import padded_size
from sss_jax.models.mask_decoder import Skips
from sss_jax.models.prompt_encoder import Prompts
from sss_jax.models.sss import SSSModel
from sss_jax.options import Options
from sss_jax.ssl.network import Features, Network
from sss_jax.ssl.pcsw import volume_prompts
from sss_jax.ssl.prompts import no_clip_prompts
from sss_jax.ssl.propagation import carry_classes

VolumeFunction = Callable[[PyTree, Any, Any], Array]


def make_volume_function(model: SSSModel, options: Options) -> VolumeFunction:
    """Return a jitted `(net params, image_SHW1, slice_mask_S) -> probability_SHWK1`.

    Pass one encodes the slices and makes the coarse masks, PCSW turns the masks of the whole
    volume into prompts, pass two carries every class by memory from its prompt through the volume
    (without memory it decodes every slice by itself). Features are kept between the passes while
    they fit `eval.keep_bytes`, else computed again, with memory once for each class. S must be a
    multiple of `eval.encode_batch` or smaller than it.
    """

    def one_view(params: PyTree, image: Array, mask: Array) -> Array:
        return _segment_volume(model, params, image, mask, options)

    def averaged(params: PyTree, image: Array, mask: Array) -> Array:
        flips = ((), (1,), (2,), (1, 2))
        views = [jnp.flip(one_view(params, jnp.flip(image, f), mask), f) for f in flips]
        return jnp.stack(views).mean(axis=0)

    return jax.jit(averaged if options.eval.flip_average else one_view)


def _segment_volume(
    model: SSSModel,
    params: PyTree,
    image_SHWC: Float[Array, "S H W 1"],
    slice_mask_S: Bool[Array, " S"],
    options: Options,
) -> Float[Array, "S H W K1"]:
    slices, height, width, _ = image_SHWC.shape
    network = Network(model, params)
    chunk = min(options.eval.encode_batch, slices)
    images = image_SHWC.reshape(-1, chunk, height, width, 1)
    by_memory = options.memory.kind != "none"

    def store(features: Features) -> PyTree:
        return network.skips(features) if by_memory else features

    shapes = jax.eval_shape(lambda image: store(network.encode(image)), images[0])
    size = sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(shapes)) * images.shape[0]
    keep = size <= options.eval.keep_bytes

    def first_pass(image: Array) -> tuple[Array, PyTree]:
        features = network.encode(image)
        return network.coarse_foreground(features), store(features) if keep else image

    coarse, stored = jax.lax.map(first_pass, images)
    coarse = coarse.reshape(1, slices, *coarse.shape[2:])
    mask_BS = slice_mask_S[None]
    if options.pcsw.enabled:
        prompts, _ = volume_prompts(coarse, mask_BS, width // coarse.shape[3], options.pcsw)
    else:
        prompts = no_clip_prompts(mask_BS, coarse.shape[-1])

    if by_memory:
        slices_of = jax.tree.map(lambda x: x.reshape(slices, *x.shape[2:]), stored)

        def skips_of(slice_BK: Array) -> Skips:
            held = jax.tree.map(lambda x: x[slice_BK[0]], slices_of)
            return held if keep else network.skips(network.encode(held))

        logits = carry_classes(network, skips_of, prompts, mask_BS, options).logits_BHWK1
        return jax.lax.map(lambda x: _probability(x[None], (height, width))[0], logits)

    def second_pass(args: tuple[PyTree, Prompts]) -> Array:
        stored, prompts = args
        features = stored if keep else network.encode(stored)
        return _probability(network.segment(features, prompts).logits_BHWK1, (height, width))

    chunks = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), prompts.images())
    probability = jax.lax.map(second_pass, (stored, chunks))
    return probability.reshape(slices, *probability.shape[2:])


def _probability(logits_NhwK1: Array, size: tuple[int, int]) -> Float[Array, "N H W K1"]:
    return jax.nn.softmax(upsample_logits(logits_NhwK1, size))


def predict_example(
    function: VolumeFunction, params: PyTree, example: Example, options: Options
) -> np.ndarray:
    """Return the class of every voxel of a prepared volume, on the stored grid, as uint8."""
    probability = predict_probability(function, params, example, options)
    return restore_labels(probability, example.placement)


def predict_probability(
    function: VolumeFunction, params: PyTree, example: Example, options: Options
) -> Float[np.ndarray, "S H W K1"]:
    """Return the probabilities of background and classes for every slice, on the network's grid."""
    image, mask = pad_slices(example.image_SHW, options)
    return np.asarray(function(params, image, mask))[: len(example.image_SHW)]


def pad_slices(image_SHW: np.ndarray, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Pad a volume to a multiple of `eval.slice_bucket`, so that few shapes are compiled."""
    slices = len(image_SHW)
    total = padded_size(slices, options.eval.slice_bucket)
    total = padded_size(total, min(options.eval.encode_batch, total))
    padded = np.pad(image_SHW, ((0, total - slices), (0, 0), (0, 0)))
    return padded[..., None].astype(np.float32), np.arange(total) < slices
