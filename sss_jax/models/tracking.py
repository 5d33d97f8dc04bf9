"""Objects through a volume: prompted slices first, then every other slice by memory.

Pure functions of parameters, bank and slices; the shapes do not depend on which slices are
prompted, so one compilation serves every volume of a padded length. Slices are the frames of SAM
2's videos.

Source: SAM 2 (Ravi et al. 2024), section 4; slices as frames: Medical SAM 2 (Zhu et al. 2024).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Bool, Float, Int, PyTree
from sss_jax.models.image_encoder import Features
from sss_jax.models.masks import AS_DECODED, MaskRules, clean_masks, separate_objects
from sss_jax.models.memory_bank import (
    EMPTY,
    Memory,
    MemoryBank,
    TwoWays,
    empty_bank,
    remember_on_the_way,
    remember_prompted,
    turn_back,
)
from sss_jax.models.prompt_encoder import Prompts, no_prompts
from sss_jax.models.sam2 import NO_OBJECT, Prediction, Sam2

CLAMP = 32.0
"""Bound of the mask logits that are fed back with a correction."""


class Prompted(NamedTuple):
    """The prompted slices of B volumes: what they left in the bank, and their masks.

    Attributes:
        bank: memory bank; its first C slots are the prompted slices.
        logits_BKCHW: masks of these slots, at four times the coarse grid.
        score_BKC: object scores of these slots.
        iou_BKC: estimated IoU of these slots.
    """

    bank: MemoryBank
    logits_BKCHW: Float[Array, "B K C H W"]
    score_BKC: Float[Array, "B K C"]
    iou_BKC: Float[Array, "B K C"]


class Track(NamedTuple):
    """Masks of K objects on every slice.

    Attributes:
        logits_SKHW: mask logits at four times the coarse grid.
        score_SK: logit that the object is in the slice.
        iou_SK: estimated IoU.
    """

    logits_SKHW: Float[Array, "S K H W"]
    score_SK: Float[Array, "S K"]
    iou_SK: Float[Array, "S K"]


def _call(model: Sam2, params: PyTree, method: str) -> Callable[..., Any]:
    """Return one of the network's methods as a function of its arguments."""
    return functools.partial(model.apply, {"params": params}, method=method)


def nothing_prompted(model: Sam2, grid: tuple[int, int], objects: int, slots: int) -> Prompted:
    """Return the start: one volume, C = `slots` prompted slices to come.

    Args:
        model: the network.
        grid: rows and columns of the coarse feature map.
        objects: K.
        slots: C.
    """
    height, width = grid
    bank = empty_bank(model.config, 1, objects, height * width, slots)
    shape = (1, objects, slots)
    logits = jnp.full((*shape, 4 * height, 4 * width), NO_OBJECT)
    return Prompted(bank, logits, jnp.full(shape, NO_OBJECT), jnp.zeros(shape))


class Place(NamedTuple):
    """From where a slice looks at what is remembered.

    Attributes:
        bank: memory bank.
        at: number of the slice.
        num_slices: slices of the volume.
        backwards: whether later slices are those behind.
    """

    bank: MemoryBank
    at: Int[Array, ""]
    num_slices: Int[Array, ""]
    backwards: Bool[Array, ""]


def segment_slice(
    model: Sam2,
    params: PyTree,
    features: Features,
    prompts: Prompts,
    previous_BKHW: Float[Array, "B K H W"] | None = None,
    place: Place | None = None,
) -> Prediction:
    """Segment a slice from points and boxes, an earlier mask, and the memory.

    Args:
        model: the network.
        params: its parameters.
        features: pyramid maps of the slice.
        prompts: points of the objects; up to one leaves the choice among three candidates.
        previous_BKHW: masks to refine, as predicted for this slice before.
        place: the memory to look at; None: no memory, as where a slice is prompted first.
    """
    seen = features if place is None else _call(model, params, "attend_memory")(features, *place)
    return _call(model, params, "predict")(
        seen,
        *prompts,
        None if previous_BKHW is None else jnp.clip(previous_BKHW, -CLAMP, CLAMP),
        multimask=(prompts.labels_BKQ >= 0).sum(axis=-1) <= 1,
        memory_conditioned=place is not None,
    )


def prompt_slice(
    model: Sam2,
    params: PyTree,
    prompted: Prompted,
    features: Features,
    index: Int[Array, ""],
    prompts: Prompts,
    *,
    previous_BKHW: Float[Array, "B K H W"] | None = None,
    num_slices: Int[Array, ""] | None = None,
    rules: MaskRules = AS_DECODED,
) -> tuple[Prompted, Prediction]:
    """Segment a slice from points and boxes, and remember it among the prompted slices.

    Differs from SAM 2: a corrected slice counts as prompted, where SAM 2's predictor by default
    keeps it among the tracked ones.

    Args:
        model: the network.
        params: its parameters.
        prompted: what was prompted so far.
        features: pyramid maps of the slice.
        index: number of the slice.
        prompts: points of the objects; objects without any are left as they are.
        previous_BKHW: masks to correct (as predicted for this slice); None: a first prompt, which
            does not look at the memory.
        num_slices: slices of the volume; needed to correct.
        rules: what is done to the masks.

    Returns:
        The new state, and the prediction for the prompted objects.
    """
    place = None
    if previous_BKHW is not None:
        assert num_slices is not None, "to correct a slice, say how many there are"
        place = Place(prompted.bank, index, num_slices, jnp.asarray(False))
    prediction = segment_slice(model, params, features, prompts, previous_BKHW, place)
    cleaned = clean_masks(prediction.logits_BKHW, rules.clean_area)
    prediction = prediction._replace(logits_BKHW=cleaned)
    given_BK = (prompts.labels_BKQ >= 0).any(-1)
    return _keep(model, params, prompted, features, index, prediction, given_BK, rules)


def prompt_mask(
    model: Sam2,
    params: PyTree,
    prompted: Prompted,
    features: Features,
    index: Int[Array, ""],
    mask_BKHW: Float[Array, "B K H W"],
    where_BK: Bool[Array, "B K"],
    rules: MaskRules = AS_DECODED,
) -> tuple[Prompted, Prediction]:
    """Take masks (0 or 1, at input resolution) of the objects in `where_BK` as they are.

    Holes and islands that somebody drew stay, whatever the rules for masks say.
    """
    prediction = _call(model, params, "adopt_mask")(features, mask_BKHW)
    return _keep(model, params, prompted, features, index, prediction, where_BK, rules)


def _keep(
    model: Sam2,
    params: PyTree,
    prompted: Prompted,
    features: Features,
    index: Array,
    prediction: Prediction,
    where_BK: Array,
    rules: MaskRules,
) -> tuple[Prompted, Prediction]:
    before_BKC = _slots(prompted.bank, model) == index
    stored = _stored(prompted.logits_BKCHW, before_BKC)
    known = where_BK | before_BKC.any(-1)
    masks = jnp.where(where_BK[..., None, None], prediction.logits_BKHW, stored)
    masks = jnp.where(known[..., None, None], masks, NO_OBJECT)
    memory = _memory(model, params, features, prediction, masks, rules, binary=True)
    bank = remember_prompted(prompted.bank, model.config, memory, index, where_BK)
    here_BKC = _slots(bank, model) == index
    new = where_BK[..., None] & here_BKC
    logits = jnp.where(
        new[..., None, None], prediction.logits_BKHW[:, :, None], prompted.logits_BKCHW
    )
    score = jnp.where(new, prediction.object_score_BK[..., None], prompted.score_BKC)
    iou = jnp.where(new, prediction.iou_BK[..., None], prompted.iou_BKC)
    return Prompted(bank, logits, score, iou), prediction


def _slots(bank: MemoryBank, model: Sam2) -> Int[Array, "B K C"]:
    """Slice numbers of the prompted slices."""
    return bank.memory_slice_BKL[:, :, : bank.conditioning(model.config)]


def _memory(
    model: Sam2,
    params: PyTree,
    features: Features,
    prediction: Prediction,
    masks_BKHW: Array,
    rules: MaskRules,
    *,
    binary: bool,
) -> Memory:
    """Remember these masks with the scores and pointers of a prediction."""
    if not rules.overlap:
        masks_BKHW = full_masks_apart(model, masks_BKHW)
    encoded = _call(model, params, "encode_memory")(
        features[2], masks_BKHW, prediction.object_score_BK, binary=binary
    )
    return Memory(encoded, prediction.pointer_BKD)


def full_masks_apart(model: Sam2, masks_BKHW: Array) -> Float[Array, "B K H W"]:
    """Bring masks to the resolution of the input, where they are remembered, without overlap."""
    scale = model.config.strides[2] // 4
    *lead, height, width = masks_BKHW.shape
    size = (*lead, scale * height, scale * width)
    return separate_objects(jax.image.resize(masks_BKHW, size, "bilinear"))


def track_slice(
    model: Sam2,
    params: PyTree,
    bank: MemoryBank,
    features: Features,
    index: Int[Array, ""],
    num_slices: Int[Array, ""],
    backwards: Bool[Array, ""],
) -> tuple[Memory, Prediction]:
    """Segment a slice from what the bank holds; the bank is left to the caller."""
    b, k = bank.memory_slice_BKL.shape[:2]
    none = no_prompts(b, k, slots=1)
    place = Place(bank, index, num_slices, backwards)
    prediction = segment_slice(model, params, features, none, None, place)
    masks = prediction.logits_BKHW
    return _memory(model, params, features, prediction, masks, AS_DECODED, binary=False), prediction


def propagate(
    model: Sam2,
    params: PyTree,
    prompted: Prompted,
    image_SHWC: Float[Array, "S H W 3"],
    start: Int[Array, ""],
    num_slices: Int[Array, ""],
    rules: MaskRules = AS_DECODED,
) -> Track:
    """Track all objects from slice `start` to the end, then from there back to the first slice.

    On the way back the slices behind are those that the way there found, as in SAM 2, and objects
    that are not prompted on `start` are tracked there once more. Prompted slices keep the masks of
    their prompts; a slice where no object is to be tracked is not even encoded. An object without
    any prompt is nowhere.

    Args:
        model: the network.
        params: its parameters.
        prompted: prompted slices of one volume (B = 1).
        image_SHWC: standardised slices, padding last.
        start: where to begin; usually the first prompted slice.
        num_slices: true number of slices, at most S.
        rules: what is done to the masks.
    """
    config = model.config
    padded = image_SHWC.shape[0]
    # Every slice once, and the start twice unless it is the first slice.
    turn_at, steps_in_use = num_slices - start, num_slices + (start > 0).astype(jnp.int32)
    known_BK = jnp.any(_slots(prompted.bank, model) != EMPTY, axis=-1)

    def visit(ways: TwoWays, i: Array) -> tuple:
        backwards = i >= turn_at
        index = jnp.where(backwards, num_slices - i, start + i)
        ways = turn_back(ways, (i == turn_at)[None, None])
        here_BKC = _slots(ways.bank, model) == index
        tracked_BK = known_BK & (i < steps_in_use) & ~here_BKC.any(axis=-1)

        place = Place(ways.bank, index, num_slices, backwards)
        follow = functools.partial(
            _follow, model, params, prompted, image_SHWC, place, known_BK, rules
        )
        memory, found = jax.lax.cond(tracked_BK.any(), follow, lambda: _zeros(follow))
        ways = remember_on_the_way(ways, config, memory, index, tracked_BK, i, backwards)
        return ways, (index, _merge(prompted, found, here_BKC, known_BK))

    steps = jnp.arange(padded + 1, dtype=jnp.int32)
    order: Array
    track: Track
    _, (order, track) = jax.lax.scan(visit, TwoWays(prompted.bank, prompted.bank), steps)
    # Steps beyond the volume, and the first visit of two, write to a row that is cut off.
    last_visit = (steps < steps_in_use) & ((steps > 0) | (start == 0))
    row = jnp.where(last_visit, order, padded)
    return jax.tree.map(lambda x: _scatter(x[:, 0], row, padded), track)


def _follow(
    model: Sam2,
    params: PyTree,
    prompted: Prompted,
    image_SHWC: Array,
    place: Place,
    known_BK: Array,
    rules: MaskRules,
) -> tuple[Memory, Prediction]:
    """Encode a slice and track all objects there; their masks are remembered before cleaning."""
    image = jax.lax.dynamic_index_in_dim(image_SHWC, jnp.maximum(place.at, 0), keepdims=True)
    features = _call(model, params, "encode_image")(image)
    b, k = known_BK.shape
    found = segment_slice(model, params, features, no_prompts(b, k, slots=1), None, place)
    here_BKC = _slots(place.bank, model) == place.at
    masks = _merge(prompted, found, here_BKC, known_BK).logits_SKHW
    memory = _memory(model, params, features, found, masks, rules, binary=False)
    cleaned = clean_masks(found.logits_BKHW, rules.clean_area)
    return memory, found._replace(logits_BKHW=cleaned)


def _zeros(function: Callable[[], Any]) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function))


def _stored(values_BKC: Array, here_BKC: Array) -> Array:
    """Pick the slot of the slice at hand; 0 where there is none."""
    extra = (1,) * (values_BKC.ndim - 3)
    return jnp.sum(jnp.where(here_BKC.reshape(*here_BKC.shape, *extra), values_BKC, 0.0), axis=2)


def _merge(prompted: Prompted, found: Prediction, here_BKC: Array, known_BK: Array) -> Track:
    """Masks of prompted slices where there are any, else the tracked ones."""

    def pick(stored: Array, tracked: Array, absent: float) -> Array:
        extra = (1,) * (tracked.ndim - 2)
        known, prompt = (x.reshape(*x.shape, *extra) for x in (known_BK, here_BKC.any(-1)))
        own = _stored(stored, here_BKC)
        return jnp.where(prompt, own, jnp.where(known, tracked, absent))

    return Track(
        pick(prompted.logits_BKCHW, found.logits_BKHW, NO_OBJECT),
        pick(prompted.score_BKC, found.object_score_BK, NO_OBJECT),
        pick(prompted.iou_BKC, found.iou_BK, 0.0),
    )


def _scatter(values: Array, row_S: Array, count: int) -> Array:
    empty = jnp.zeros((count + 1, *values.shape[1:]), values.dtype)
    return empty.at[row_S].set(values)[:count]
