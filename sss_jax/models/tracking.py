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
from sss_jax.models.memory_bank import (
    EMPTY,
    Memory,
    MemoryBank,
    empty_bank,
    remember_prompted,
    remember_tracked,
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

    Returns:
        The new state, and the prediction for the prompted objects.
    """
    points, labels = prompts
    given_BKQ = labels >= 0
    masks = None if previous_BKHW is None else jnp.clip(previous_BKHW, -CLAMP, CLAMP)
    conditioned = masks is not None
    seen = features
    if conditioned:
        assert num_slices is not None, "to correct a slice, say how many there are"
        seen = _call(model, params, "attend_memory")(
            features, prompted.bank, index, num_slices, False
        )
    prediction = _call(model, params, "predict")(
        seen,
        points,
        labels,
        masks,
        multimask=given_BKQ.sum(axis=-1) <= 1,
        memory_conditioned=conditioned,
    )
    return _keep(model, params, prompted, features, index, prediction, given_BKQ.any(-1))


def prompt_mask(
    model: Sam2,
    params: PyTree,
    prompted: Prompted,
    features: Features,
    index: Int[Array, ""],
    mask_BKHW: Float[Array, "B K H W"],
    where_BK: Bool[Array, "B K"],
) -> tuple[Prompted, Prediction]:
    """Take masks (0 or 1, at input resolution) of the objects in `where_BK` as they are."""
    prediction = _call(model, params, "adopt_mask")(features, mask_BKHW)
    return _keep(model, params, prompted, features, index, prediction, where_BK)


def _keep(
    model: Sam2,
    params: PyTree,
    prompted: Prompted,
    features: Features,
    index: Array,
    prediction: Prediction,
    where_BK: Array,
) -> tuple[Prompted, Prediction]:
    memory = _memory(model, params, features, prediction, binary=True)
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
    model: Sam2, params: PyTree, features: Features, prediction: Prediction, *, binary: bool
) -> Memory:
    encoded = _call(model, params, "encode_memory")(
        features[2], prediction.logits_BKHW, prediction.object_score_BK, binary=binary
    )
    return Memory(encoded, prediction.pointer_BKD)


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
    seen = _call(model, params, "attend_memory")(features, bank, index, num_slices, backwards)
    b, k = bank.memory_slice_BKL.shape[:2]
    predict = _call(model, params, "predict")
    none = no_prompts(b, k, slots=1)
    prediction = predict(seen, *none, multimask=True, memory_conditioned=True)
    return _memory(model, params, features, prediction, binary=False), prediction


def propagate(
    model: Sam2,
    params: PyTree,
    prompted: Prompted,
    image_SHWC: Float[Array, "S H W 3"],
    start: Int[Array, ""],
    num_slices: Int[Array, ""],
) -> Track:
    """Track all objects from slice `start` to the end, then from there back to the first slice.

    On the way back the slices behind are those that the way there found, as in SAM 2. Prompted
    slices keep the masks of their prompts. An object without any prompt is nowhere.

    Args:
        model: the network.
        params: its parameters.
        prompted: prompted slices of one volume (B = 1).
        image_SHWC: standardised slices, padding last.
        start: where to begin; usually the first prompted slice.
        num_slices: true number of slices, at most S.
    """
    config = model.config
    padded = image_SHWC.shape[0]
    known_BK = jnp.any(_slots(prompted.bank, model) != EMPTY, axis=-1)

    def visit(carry: tuple[MemoryBank, MemoryBank], i: Array) -> tuple:
        bank, turn = carry
        backwards = i >= num_slices - start
        index = jnp.where(backwards, num_slices - 1 - i, start + i)
        inside = i < num_slices
        bank = jax.tree.map(lambda a, b: jnp.where(i == num_slices - start, a, b), turn, bank)
        image = jax.lax.dynamic_index_in_dim(image_SHWC, jnp.maximum(index, 0), keepdims=True)
        features = _call(model, params, "encode_image")(image)
        memory, found = track_slice(model, params, bank, features, index, num_slices, backwards)
        here_BKC = _slots(bank, model) == index
        tracked_BK = known_BK & inside & ~here_BKC.any(axis=-1)
        bank = remember_tracked(bank, config, memory, index, tracked_BK, tracked_BK)
        # The slices next to the start serve the way back too; the rings forget them on the way on.
        early = ~backwards & tracked_BK
        turn = remember_tracked(
            turn,
            config,
            memory,
            index,
            early & (i < config.num_maskmem - 1),
            early & (i < config.max_pointers - 1),
        )
        return (bank, turn), (index, _merge(prompted, found, here_BKC, known_BK))

    steps = jnp.arange(padded, dtype=jnp.int32)
    order: Array
    track: Track
    _, (order, track) = jax.lax.scan(visit, (prompted.bank, prompted.bank), steps)
    # Steps beyond the volume write to a row that is cut off.
    row = jnp.where(steps < num_slices, order, padded)
    return jax.tree.map(lambda x: _scatter(x[:, 0], row, padded), track)


def _merge(prompted: Prompted, found: Prediction, here_BKC: Array, known_BK: Array) -> Track:
    """Masks of prompted slices where there are any, else the tracked ones."""

    def pick(stored: Array, tracked: Array, absent: float) -> Array:
        extra = (1,) * (tracked.ndim - 2)
        here = here_BKC.reshape(*here_BKC.shape, *extra)
        own = jnp.sum(jnp.where(here, stored, 0.0), axis=2)
        known, prompt = (x.reshape(*x.shape, *extra) for x in (known_BK, here_BKC.any(-1)))
        return jnp.where(prompt, own, jnp.where(known, tracked, absent))

    return Track(
        pick(prompted.logits_BKCHW, found.logits_BKHW, NO_OBJECT),
        pick(prompted.score_BKC, found.object_score_BK, NO_OBJECT),
        pick(prompted.iou_BKC, found.iou_BK, 0.0),
    )


def _scatter(values: Array, row_S: Array, count: int) -> Array:
    empty = jnp.zeros((count + 1, *values.shape[1:]), values.dtype)
    return empty.at[row_S].set(values)[:count]
