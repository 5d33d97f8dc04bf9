"""Objects through a volume from prompts on a few slices, in one go."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from sss_jax import compiling
from sss_jax.axes import PyTree
from sss_jax.errors import ConfigError, DataError
from sss_jax.models import tracking
from sss_jax.models.image_encoder import normalise_image
from sss_jax.models.layers import padded_size
from sss_jax.models.masks import MaskRules, separate_objects
from sss_jax.models.sam2 import Sam2
from sss_jax.sam2_inputs import Prompt, padded, square, square_mask, to_size
from sss_jax.sam2_network import Network, encode

SLICE_BUCKET = 16
"""Volumes are padded to a multiple of this many slices, so that few lengths are compiled."""


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


def predict_volume(
    network: Network,
    volume: ArrayLike,
    prompts: Mapping[int, Sequence[Prompt]],
    *,
    clean_area: int = 0,
    overlap: bool = True,
) -> VolumePrediction:
    """Segment objects through a volume from prompts on a few slices, by SAM-2's memory.

    Args:
        network: the network.
        volume: [S, H, W], integers 0..255 or floats in [0, 1].
        prompts: for each object (its label, from 1 on) what is known of it.
        clean_area: fill holes and remove islands of up to so many pixels of the mask's grid, each
            of which is 4 x 4 pixels of the network's input; 0: leave them.
        overlap: whether objects may claim the same pixel; else the higher logit has it, in what is
            returned and in what the network remembers.

    Raises:
        DataError: no prompt, or one outside the volume.
        ConfigError: an area that is negative or a whole mask.
    """
    volume = np.asarray(volume)
    check_area(network, clean_area)
    rules = MaskRules(clean_area, overlap)
    _check_prompts(prompts, volume.shape)
    objects = tuple(prompts)
    planes = np.stack([square(image, network.size) for image in volume])
    missing = padded_size(len(planes), SLICE_BUCKET) - len(planes)
    planes = np.pad(planes, ((0, missing), *[(0, 0)] * 3))
    prompted = _prompt_slices(
        network, planes, [prompts[k] for k in objects], volume.shape[1:], rules
    )
    start = min(p.slice for group in prompts.values() for p in group)
    track = _propagate(
        network.model,
        network.params,
        prompted,
        planes,
        jnp.int32(start),
        jnp.int32(len(volume)),
        rules,
    )
    low = np.asarray(track.logits_SKHW[: len(volume)])
    logits = np.stack([full_logits(one, volume.shape[1:], rules).astype(np.float16) for one in low])
    return VolumePrediction(logits, np.asarray(track.score_SK[: len(volume)]), objects)


def full_logits(
    low_KHW: NDArray[np.float32], size: tuple[int, ...], rules: MaskRules
) -> NDArray[np.float32]:
    """Bring the masks of all objects on a slice to its size."""
    full = to_size(low_KHW, size)
    return full if rules.overlap else np.asarray(_separate(full[None])[0])


_separate = compiling.jit(separate_objects)


def check_area(network: Network, clean_area: int) -> None:
    """Refuse an area that no hole or island has; a whole mask would be one."""
    config = network.model.config
    pixels = (4 * network.size // config.strides[2]) ** 2
    if not 0 <= clean_area < pixels:
        raise ConfigError(
            f"clean_area: {clean_area} is not in 0..{pixels - 1}; masks have {pixels} pixels"
        )


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
    planes: NDArray[np.float32],
    groups: list[Sequence[Prompt]],
    plane: tuple[int, ...],
    rules: MaskRules,
) -> tracking.Prompted:
    """Prompt slice by slice, all objects of a slice at once."""
    model, params = network.model, network.params
    side = network.size // model.config.strides[2]
    slots = max(len(group) for group in groups)
    state = tracking.nothing_prompted(model, (side, side), len(groups), slots)
    wide = max(1, *(len(p.tokens()[1]) for group in groups for p in group))
    for index in sorted({p.slice for group in groups for p in group}):
        here = [next((p for p in group if p.slice == index), None) for group in groups]
        features = encode(model, params, planes[index][None])
        at = jnp.int32(index)
        drawn = [p is not None and p.mask is not None for p in here]
        pointed = [p is not None and p.mask is None for p in here]
        if any(pointed):
            points = padded(here, wide, plane, network.size)
            state = _prompt(model, params, state, features, at, points, rules)
        if any(drawn):
            masks = np.stack([square_mask(p, network.size) for p in here])[None]
            state = _adopt(model, params, state, features, at, masks, np.array([drawn]), rules)
    return state


_jit = functools.partial(compiling.jit, static_argnames=("model", "rules"))


@_jit
def _prompt(
    model: Sam2, params: PyTree, state: Any, features: Any, at: Any, prompts: Any, rules: MaskRules
) -> Any:
    return tracking.prompt_slice(model, params, state, features, at, prompts, rules=rules)[0]


@_jit
def _adopt(
    model: Sam2,
    params: PyTree,
    state: Any,
    features: Any,
    at: Any,
    masks: Any,
    where: Any,
    rules: MaskRules,
) -> Any:
    return tracking.prompt_mask(model, params, state, features, at, masks, where, rules)[0]


@_jit
def _propagate(
    model: Sam2,
    params: PyTree,
    prompted: Any,
    image_SHWC: Any,
    start: Any,
    count: Any,
    rules: MaskRules,
) -> Any:
    standard = normalise_image(image_SHWC).astype(model.config.compute_dtype)
    return tracking.propagate(model, params, prompted, standard, start, count, rules)
