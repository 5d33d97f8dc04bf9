"""Clicks, tracking and corrections of objects in a volume, as immutable data and pure functions.

Each object is a `Thread`: dictionaries by slice that nobody changes, so a state that was kept is a
state to go back to. What runs on the device has the same shapes for every slice, every number of
slices and of objects, and for numbers of clicks and of prompted slices in coarse steps; it is
compiled once.

Source: SAM 2 (Ravi et al. 2024), sections 3 and 4, and what its published predictor does.
Differs from SAM 2's predictor: a corrected slice counts as prompted from then on (there an option);
masks that somebody drew are kept as they are where holes are filled.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from sss_jax import compiling
from sss_jax.axes import Array, Float, PyTree
from sss_jax.models import tracking
from sss_jax.models.image_encoder import Features
from sss_jax.models.masks import AS_DECODED, MaskRules, clean_masks
from sss_jax.models.memory_bank import EMPTY, Memory, MemoryBank
from sss_jax.models.prompt_encoder import PADDING, Prompts
from sss_jax.models.sam2 import Prediction, Sam2

STEP = 4
"""Clicks, and prompted slices, are padded to powers of this number."""

NO_POINTS = np.zeros((0, 2), np.float32), np.zeros(0, np.int32)


class Finding(NamedTuple):
    """What was found of one object on one slice (B = K = 1).

    Attributes:
        prediction: mask, scores and pointer.
        memory_BKPM: what other slices look at; None until the object is followed from here.
    """

    prediction: Prediction
    memory_BKPM: Float[Array, "B K P M"] | None = None

    def memory(self) -> Memory:
        """What the slice leaves behind."""
        assert self.memory_BKPM is not None
        return Memory(self.memory_BKPM, self.prediction.pointer_BKD)


class Thread(NamedTuple):
    """One object in a volume.

    Attributes:
        points: all points of a slice so far, [Q, 2] and their labels [Q].
        fresh: slices prompted since the object was followed last; nothing looks at them yet.
        prompted: slices prompted before.
        tracked: slices that memory found.
        backwards: slices that were visited on the way; whether they were on the way back.
    """

    points: Mapping[int, tuple[NDArray[np.float32], NDArray[np.int32]]] = {}
    fresh: Mapping[int, Finding] = {}
    prompted: Mapping[int, Finding] = {}
    tracked: Mapping[int, Finding] = {}
    backwards: Mapping[int, bool] = {}

    def finding(self, index: int) -> Finding | None:
        """Return the latest that is known of a slice."""
        for known in (self.fresh, self.prompted, self.tracked):
            if index in known:
                return known[index]
        return None


Threads = Mapping[int, Thread]


class Scene(NamedTuple):
    """What does not change while somebody clicks.

    Attributes:
        model: the network.
        params: its parameters.
        num_slices: slices of the volume.
        blank: a memory of nothing, which fills unused slots.
        rules: what is done to the masks.
    """

    model: Sam2
    params: PyTree
    num_slices: int
    blank: Memory
    rules: MaskRules = AS_DECODED


def make_scene(
    model: Sam2, params: PyTree, num_slices: int, rules: MaskRules = AS_DECODED
) -> Scene:
    """Return the scene of a volume whose slices are squares of `model.config.image_size`."""
    c = model.config
    positions = (c.image_size // c.strides[2]) ** 2
    blank = Memory(
        jnp.zeros((1, 1, positions, c.memory_width), c.compute_dtype),
        jnp.zeros((1, 1, c.width), c.compute_dtype),
    )
    return Scene(model, params, num_slices, blank, rules)


def add_points(
    scene: Scene,
    thread: Thread,
    features: Features,
    index: int,
    points_Q2: NDArray[np.float32],
    labels_Q: NDArray[np.int32],
    *,
    replace: bool = False,
) -> Thread:
    """Segment a slice from its points so far and new ones.

    The mask that the slice has goes in as well. A slice that was never visited is segmented without
    memory; on one that was, the memory takes part, from the side that it was visited from.

    Args:
        scene: network and options.
        thread: the object.
        features: pyramid maps of the slice.
        index: its number.
        points_Q2: new points (x, y), input pixels.
        labels_Q: as `Prompts.labels_BKQ`.
        replace: forget the earlier points of the slice.
    """
    if index in thread.points and not replace:
        earlier = thread.points[index]
        points_Q2 = np.concatenate([earlier[0], points_Q2])
        labels_Q = np.concatenate([earlier[1], labels_Q])
    known = thread.finding(index)
    look = None
    if index in thread.backwards and thread.prompted:
        look = _look(scene, thread, index, thread.backwards[index])
    prediction, _ = _segment(
        scene.model,
        scene.params,
        features,
        _padded(points_Q2, labels_Q),
        None if known is None else known.prediction.logits_BKHW,
        look,
        scene.rules.clean_area,
    )
    return thread._replace(
        points={**thread.points, index: (points_Q2, labels_Q)},
        fresh={**thread.fresh, index: Finding(prediction)},
    )


def add_mask(
    scene: Scene, thread: Thread, features: Features, index: int, mask_HW: NDArray[np.float32]
) -> Thread:
    """Take a mask (0 or 1, at input resolution) as it is; the points of the slice are forgotten."""
    prediction = _adopt(scene.model, scene.params, features, mask_HW[None, None])
    return thread._replace(
        points=_without(thread.points, index),
        fresh={**thread.fresh, index: Finding(prediction)},
    )


def remove_prompts(thread: Thread, index: int) -> Thread:
    """Take back every prompt of a slice.

    What the slice showed before its last prompts comes back. Where these prompts were followed
    already, their mask counts as tracked until the slice is visited again.
    """
    thread = thread._replace(
        points=_without(thread.points, index), fresh=_without(thread.fresh, index)
    )
    if index not in thread.prompted:
        return thread
    return thread._replace(
        prompted=_without(thread.prompted, index),
        tracked={**thread.tracked, index: thread.prompted[index]},
        backwards=_without(thread.backwards, index),
    )


def route(threads: Threads, num_slices: int) -> list[tuple[int, bool]]:
    """Slices in the order of tracking, and whether each is visited on the way back.

    From the first prompted slice to the end, and from there back to the beginning: objects that
    were prompted elsewhere have more to look at when they pass the first prompted slice again.
    """
    start = min(i for thread in threads.values() for i in (*thread.prompted, *thread.fresh))
    there = [(index, False) for index in range(start, num_slices)]
    return there + [(index, True) for index in range(start, -1, -1) if start > 0]


def remember_prompts(
    scene: Scene, threads: Threads, features_of: Callable[[int], Features]
) -> Threads:
    """Let the slices that were prompted since be looked at."""
    for index in sorted({i for thread in threads.values() for i in thread.fresh}):
        found = {name: finding for name, t in threads.items() if (finding := t.finding(index))}
        masks = _masks_to_remember(scene, {n: f.prediction.logits_BKHW for n, f in found.items()})
        for name in [n for n in found if index in threads[n].fresh]:
            thread, prediction = threads[name], found[name].prediction
            memory = _remember(scene, features_of(index), masks[name], prediction, binary=True)
            thread = thread._replace(
                fresh=_without(thread.fresh, index),
                prompted={**thread.prompted, index: Finding(prediction, memory)},
                tracked=_without(thread.tracked, index),
            )
            threads = {**threads, name: thread}
    return threads


def visit(
    scene: Scene,
    threads: Threads,
    features_of: Callable[[int], Features],
    index: int,
    backwards: bool,
) -> Threads:
    """Segment a slice by memory for every object that is not prompted there, and remember it."""
    found = {n: t.prompted[index].prediction for n, t in threads.items() if index in t.prompted}
    masks = {name: prediction.logits_BKHW for name, prediction in found.items()}
    tracked = [name for name in threads if name not in found]
    for name in tracked:
        look = _look(scene, threads[name], index, backwards)
        arguments = scene.model, scene.params, features_of(index), _padded(*NO_POINTS), None, look
        found[name], masks[name] = _segment(*arguments, scene.rules.clean_area)
    masks = _masks_to_remember(scene, {name: masks[name] for name in threads})
    threads = {
        name: t._replace(backwards={**t.backwards, index: backwards}) for name, t in threads.items()
    }
    for name in tracked:
        memory = _remember(scene, features_of(index), masks[name], found[name], binary=False)
        finding = Finding(found[name], memory)
        thread = threads[name]
        thread = thread._replace(tracked={**thread.tracked, index: finding})
        threads = {**threads, name: thread}
    return threads


def _without(mapping: Mapping[int, Any], index: int) -> dict[int, Any]:
    return {key: value for key, value in mapping.items() if key != index}


def _power(count: int) -> int:
    size = STEP
    while size < count:
        size *= STEP
    return size


def _padded(points_Q2: NDArray[np.float32], labels_Q: NDArray[np.int32]) -> Prompts:
    missing = _power(len(labels_Q)) - len(labels_Q)
    points = np.pad(points_Q2.astype(np.float32), ((0, missing), (0, 0)))
    labels = np.pad(labels_Q.astype(np.int32), (0, missing), constant_values=PADDING)
    return Prompts(jnp.asarray(points[None, None]), jnp.asarray(labels[None, None]))


class _Look(NamedTuple):
    """What a slice may look at, in lists whose lengths hardly ever change."""

    memories: tuple[Array, ...]
    memory_slices: NDArray[np.int32]
    pointers: tuple[Array, ...]
    pointer_slices: NDArray[np.int32]
    at: Array
    num_slices: Array
    backwards: Array


def _look(scene: Scene, thread: Thread, index: int, backwards: bool) -> _Look:
    c = scene.model.config
    own = [*thread.prompted]
    own += [EMPTY] * (_power(len(own)) - len(own))
    step = -1 if backwards else 1
    behind = [index - step * distance for distance in range(1, c.max_pointers)]
    behind = [i if i in thread.tracked else EMPTY for i in behind]
    memory_slices, pointer_slices = own + behind[: c.num_maskmem - 1], own + behind
    known = {**thread.tracked, **thread.prompted}
    kept = {i: known[i].memory() for i in pointer_slices if i != EMPTY} | {EMPTY: scene.blank}
    return _Look(
        tuple(kept[i].memory_BKPM for i in memory_slices),
        np.array(memory_slices, np.int32),
        tuple(kept[i].pointer_BKD for i in pointer_slices),
        np.array(pointer_slices, np.int32),
        jnp.asarray(index, jnp.int32),
        jnp.asarray(scene.num_slices, jnp.int32),
        jnp.asarray(backwards),
    )


def _place(look: _Look) -> tracking.Place:
    bank = MemoryBank(
        jnp.stack(look.memories, axis=2),
        jnp.asarray(look.memory_slices)[None, None],
        jnp.stack(look.pointers, axis=2),
        jnp.asarray(look.pointer_slices)[None, None],
    )
    return tracking.Place(bank, look.at, look.num_slices, look.backwards)


@functools.partial(compiling.jit, static_argnames=("model", "clean_area"))
def _segment(
    model: Sam2,
    params: PyTree,
    features: Features,
    prompts: Prompts,
    previous_BKHW: Array | None,
    look: _Look | None,
    clean_area: int,
) -> tuple[Prediction, Array]:
    """Return the prediction, and its mask before it was cleaned."""
    place = None if look is None else _place(look)
    found = tracking.segment_slice(model, params, features, prompts, previous_BKHW, place)
    cleaned = clean_masks(found.logits_BKHW, clean_area)
    return found._replace(logits_BKHW=cleaned), found.logits_BKHW


@functools.partial(compiling.jit, static_argnames="model")
def _adopt(model: Sam2, params: PyTree, features: Features, mask_BKHW: Any) -> Prediction:
    adopt = functools.partial(model.apply, {"params": params}, method="adopt_mask")
    return cast(Prediction, adopt(features, mask_BKHW))


@functools.partial(compiling.jit, static_argnames="model")
def _encode_memory(
    model: Sam2, params: PyTree, coarse: Array, mask: Array, score: Array, binary: Any
) -> Array:
    encode = functools.partial(model.apply, {"params": params}, method="encode_memory")
    return cast(Array, encode(coarse, mask, score, binary=binary))


def _remember(
    scene: Scene, features: Features, mask_BKHW: Array, found: Prediction, *, binary: bool
) -> Array:
    arguments = features[2], mask_BKHW, found.object_score_BK, np.bool_(binary)
    return _encode_memory(scene.model, scene.params, *arguments)


def _masks_to_remember(scene: Scene, masks: dict[Any, Array]) -> dict[Any, Array]:
    """Masks of all objects on a slice, apart from each other where they must not overlap."""
    if scene.rules.overlap or len(masks) < 2:
        return masks
    return dict(zip(masks, _separate(scene.model, tuple(masks.values())), strict=True))


@functools.partial(compiling.jit, static_argnames="model")
def _separate(model: Sam2, masks: tuple[Array, ...]) -> list[Array]:
    """Return the masks at the resolution of the input, where memories are made of them."""
    apart = tracking.full_masks_apart(model, jnp.concatenate(masks, axis=1))
    return jnp.split(apart, len(masks), axis=1)
